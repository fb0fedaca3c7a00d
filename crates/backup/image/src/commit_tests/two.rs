//! Two backups of one volume at once.
