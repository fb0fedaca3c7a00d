//! Which mode a device gets, and why not another: decided over facts, the same way for `volume add` and `doctor`.
//!
//! | the device | `auto` takes |
//! |---|---|
//! | in use | `watch`, or nothing: what is in use gets nothing into its way unless that is named |
//! | not in use, with a file system that can be frozen | `watch`, else `fuse` |
//! | not in use, anything else | `fuse` |
//! | a regular file | `fuse` |

use blktide_api::config::Mode;

use crate::file_system::FileSystem;

/// All modes that a volume may have, in the order in which they are told.
pub(crate) const ALL: [Mode; 3] = [Mode::Watch, Mode::Ublk, Mode::Fuse];

/// What is known of a device or file.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    /// A regular file.
    pub(crate) is_file: bool,
    /// By whom it is used.
    pub(crate) used_by: Option<String>,
    /// What it holds.
    pub(crate) file_system: Option<FileSystem>,
    /// What stands against mode watch: of the kernel, of the device. With what to do about it.
    pub(crate) against_watch: Vec<String>,
    /// What this machine lacks for mode fuse.
    pub(crate) against_fuse: Vec<String>,
}

impl Facts {
    /// Why `mode` cannot be had; `None`: it can.
    pub(crate) fn refusal(&self, mode: Mode) -> Option<String> {
        let all = |against: &[String]| (!against.is_empty()).then(|| against.join("; "));
        match mode {
            Mode::Auto => self.auto().err(),
            Mode::Watch if self.is_file => {
                Some("it is a regular file, and the kernel tells of devices only".to_owned())
            }
            Mode::Watch => all(&self.against_watch),
            Mode::Ublk => Some("it is not built yet".to_owned()),
            Mode::Fuse => match &self.used_by {
                Some(user) => Some(format!(
                    "it can only be put under a device that is not in use: {user}"
                )),
                None => all(&self.against_fuse),
            },
        }
    }

    /// What `auto` takes, and why; or why nothing.
    pub(crate) fn auto(&self) -> Result<(Mode, String), String> {
        let watch = self.refusal(Mode::Watch);
        if let Some(user) = &self.used_by {
            return match watch {
                None => Ok((
                    Mode::Watch,
                    format!("it is in use ({user}), and nothing gets into its way"),
                )),
                Some(why) => Err(format!(
                    "it is in use ({user}), and mode watch cannot be had: {why}"
                )),
            };
        }
        let (frozen, name) = match self.file_system {
            Some(found) => (found.freezes, found.name),
            None => (false, "none"),
        };
        if frozen && watch.is_none() {
            return Ok((
                Mode::Watch,
                format!("it holds {name}, which can be frozen for the moment of an image"),
            ));
        }
        if let Some(why) = self.refusal(Mode::Fuse) {
            return Err(format!("mode fuse cannot be had: {why}"));
        }
        let why = match (self.is_file, self.file_system, watch) {
            (true, _, _) => "it is a regular file".to_owned(),
            (false, Some(found), _) if !found.freezes => {
                format!("it is not in use, and its {name} cannot be frozen")
            }
            (false, Some(_), Some(why)) => format!("mode watch cannot be had: {why}"),
            (false, _, _) => {
                "it is not in use, and holds no file system that can be frozen".to_owned()
            }
        };
        Ok((Mode::Fuse, why))
    }
}

/// What a mode gives, in plain words.
pub(crate) const fn promise(mode: Mode) -> &'static str {
    match mode {
        Mode::Auto => "",
        Mode::Watch => {
            "put on and taken off while the volume is in use; nothing in the way of a read or write; an image is the file system frozen for a moment"
        }
        Mode::Ublk => "as fuse, and may be put under a volume that is in use",
        Mode::Fuse => {
            "an image is one exact instant, and no file system need be frozen for it; what writes past the tracker is found out by its traces"
        }
    }
}

/// What a mode costs, in plain words.
pub(crate) const fn cost(mode: Mode) -> &'static str {
    match mode {
        Mode::Auto => "",
        Mode::Watch => {
            "kernel memory, 64 MiB a TiB; a freeze a backup (freeze_budget); after a crash, or a boot that wrote before it was attached, the next backup reads everything"
        }
        Mode::Ublk => {
            "reads and writes pass a process; room for originals during a backup; after a crash the next backup reads everything"
        }
        Mode::Fuse => {
            "unmounted once, and another node in fstab; reads and writes pass a process; room for originals during a backup; after a crash the next backup reads everything"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXT4: Option<FileSystem> = Some(FileSystem {
        name: "ext4",
        freezes: true,
    });
    const FAT: Option<FileSystem> = Some(FileSystem {
        name: "FAT",
        freezes: false,
    });

    fn facts(file_system: Option<FileSystem>, used: bool, against: [&[&str]; 2]) -> Facts {
        let [against_watch, against_fuse] =
            against.map(|list| list.iter().map(|why| (*why).to_owned()).collect());
        Facts {
            is_file: false,
            used_by: used.then(|| "mounted at /srv".to_owned()),
            file_system,
            against_watch,
            against_fuse,
        }
    }

    /// req X9: nothing gets into the way of a device in use by itself; what is free gets what suits it.
    #[test]
    fn auto_is_a_table() {
        let none: &[&str] = &[];
        let zoned: &[&str] = &["it is a zoned device"];
        let no_fuse: &[&str] = &["there is no /dev/fuse"];
        let cases = [
            (
                EXT4,
                true,
                [none, none],
                Ok((Mode::Watch, "mounted at /srv")),
            ),
            (FAT, true, [none, none], Ok((Mode::Watch, "in use"))),
            (None, true, [none, no_fuse], Ok((Mode::Watch, "in use"))),
            (EXT4, true, [zoned, none], Err("zoned device")),
            (EXT4, false, [none, none], Ok((Mode::Watch, "holds ext4"))),
            (
                EXT4,
                false,
                [none, no_fuse],
                Ok((Mode::Watch, "holds ext4")),
            ),
            (EXT4, false, [zoned, none], Ok((Mode::Fuse, "zoned device"))),
            (EXT4, false, [zoned, no_fuse], Err("/dev/fuse")),
            (
                FAT,
                false,
                [none, none],
                Ok((Mode::Fuse, "FAT cannot be frozen")),
            ),
            (
                None,
                false,
                [none, none],
                Ok((Mode::Fuse, "no file system")),
            ),
            (None, false, [none, no_fuse], Err("/dev/fuse")),
        ];
        for (file_system, used, against, wanted) in cases {
            let found = facts(file_system, used, against).auto();
            match (&found, wanted) {
                (Ok((mode, why)), Ok((expected, words))) => {
                    assert_eq!(*mode, expected, "{why}");
                    assert!(why.contains(words), "{why}");
                }
                (Err(why), Err(words)) => assert!(why.contains(words), "{why}"),
                _ => panic!("{found:?}, not {wanted:?}"),
            }
        }
    }

    #[test]
    fn a_file_is_served_by_fuse_and_cannot_be_watched() {
        let file = Facts {
            is_file: true,
            file_system: EXT4,
            ..Facts::default()
        };
        assert_eq!(file.auto().unwrap().0, Mode::Fuse);
        assert!(file.refusal(Mode::Watch).unwrap().contains("regular file"));
        let used = Facts {
            used_by: Some("/dev/loop0 is bound to it".to_owned()),
            ..file
        };
        assert!(used.auto().unwrap_err().contains("regular file"));
        assert!(used.refusal(Mode::Fuse).unwrap().contains("/dev/loop0"));
    }

    #[test]
    fn a_mode_that_is_named_is_refused_for_its_own_reasons_only() {
        let raw = facts(None, false, [&[], &["there is no /dev/fuse"]]);
        assert_eq!(
            raw.refusal(Mode::Watch),
            None,
            "it can be watched all the same"
        );
        assert!(raw.refusal(Mode::Ublk).unwrap().contains("not built"));
        let used = facts(EXT4, true, [&["one", "two"], &[]]);
        assert_eq!(used.refusal(Mode::Watch).unwrap(), "one; two");
        assert!(used.refusal(Mode::Fuse).unwrap().contains("not in use"));
    }
}
