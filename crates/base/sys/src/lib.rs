//! Every unsafe line: mapped memory, rings, FUSE, loop, locks, processes, descriptors.
