//! Each file that may be found at attach, and the reason that it gives.

use super::super::{
    Begun, Bitmap, Found, HandoverError, Identity, Name, Situation, Stored, Surroundings, Verdict,
    attach, decide, forget, stop,
};
use super::folder::{Folder, identity, peek};
use crate::evidence::{Evidence, ReadAt, collect};
use crate::tracker::StoredGeneration;
use blktide_format::marker::{self, Marker, State};
use blktide_testkit::disk::{Failure, Fault, Kind, Node, SimDisk};
use blktide_testkit::pattern::noise;
use blktide_testkit::seed::Seed;
use blktide_types::clock::WallTime;
use blktide_types::geometry::Geometry;
use blktide_types::id::{BootId, GenerationName, LifeId, VolumeId};
use blktide_types::reason::Reason;
use blktide_types::unit::BlockSize;
use std::io;

fn generations() -> Vec<StoredGeneration> {
    [(1, 0b0001), (2, 0b0110), (3, 0)]
        .map(|(number, bits)| StoredGeneration {
            name: GenerationName([number; 16]),
            counter: number.into(),
            opened: WallTime(number.into()),
            words: vec![bits],
        })
        .to_vec()
}

fn with<T>(disk: &SimDisk, folder: Node, run: impl FnOnce(&mut Folder<'_>) -> T) -> T {
    let mut look = |_: &SimDisk| ();
    run(&mut Folder {
        disk,
        node: folder,
        plant: None,
        attaching: true,
        evidence: Evidence::blind(),
        look: &mut look,
    })
}

fn store(disk: &SimDisk, folder: Node, who: Identity) {
    let bitmap = Bitmap::Known {
        generations: generations(),
        distrust: None,
    };
    let stored = with(disk, folder, |f| stop(who, bitmap, f));
    assert_eq!(stored, Stored::Whole);
}

/// What a clean stop of life 1 in boot 1 leaves.
fn left() -> Situation {
    let disk = SimDisk::new();
    store(&disk, disk.root(), identity(1, 1));
    let content = |name| Found::Content(peek(&disk, disk.root(), name).unwrap());
    Situation {
        marker: content(Name::Marker),
        file: content(Name::Bitmap),
        evidence: Some(Evidence::blind()),
    }
}

fn reason(situation: &Situation, who: &Identity) -> Option<Reason> {
    match decide(situation, who) {
        Verdict::Believed { .. } => None,
        Verdict::NotBelieved { reason, .. } => Some(reason),
    }
}

/// `left()`, one thing in it changed, judged by life 2 of boot 1.
fn after(change: impl FnOnce(&mut Situation, &mut Identity)) -> Option<Reason> {
    let (mut situation, mut who) = (left(), identity(2, 1));
    change(&mut situation, &mut who);
    reason(&situation, &who)
}

fn bytes_of(found: &Found) -> Vec<u8> {
    match found {
        Found::Content(bytes) => bytes.clone(),
        Found::Absent | Found::Unreadable => panic!("nothing there"),
    }
}

fn says(state: State) -> Found {
    let marker = Marker {
        state,
        volume: identity(1, 1).volume,
        life: LifeId([1; 16]),
        boot: BootId([1; 16]),
    };
    Found::Content(marker::encode(&marker).to_vec())
}

/// req A5: undamaged, it is believed, with all generations and the open one last.
#[test]
fn a_clean_stop_is_believed() {
    let Verdict::Believed {
        generations: back,
        distrust,
    } = decide(&left(), &identity(2, 9))
    else {
        panic!("not believed");
    };
    assert_eq!((back, distrust), (generations(), None));
}

/// req A5, A6: every way in which file and marker can be wrong, and its word of the interface.
///
/// trap TB8, TC6, TC11, TD1.
#[test]
fn each_has_its_reason() {
    use Reason::{
        BitmapDamaged, BitmapMissing, BitmapOtherSize, BitmapOtherVolume, BitmapStale,
        ForeignWrite, ForeignWriteUnknown, TrackerSuspect, TrackingInterrupted, UncleanShutdown,
    };
    let shape = |bytes, block, grain| {
        let size = |bytes| BlockSize::new(bytes).unwrap();
        Geometry::new(bytes, size(block), size(grain), 512, 512).unwrap()
    };
    assert_eq!(after(|_, _| ()), None);
    assert_eq!(after(|s, _| s.file = Found::Absent), Some(BitmapMissing));
    assert_eq!(after(|s, _| s.marker = Found::Absent), Some(BitmapMissing));
    assert_eq!(
        after(|s, _| s.file = Found::Content(Vec::new())),
        Some(BitmapDamaged)
    );
    assert_eq!(
        after(|s, _| s.marker = Found::Content(Vec::new())),
        Some(BitmapDamaged)
    );
    assert_eq!(
        after(|s, _| s.file = Found::Unreadable),
        Some(BitmapDamaged)
    );
    assert_eq!(
        after(|s, _| s.marker = Found::Unreadable),
        Some(BitmapDamaged)
    );
    assert_eq!(
        after(|_, who| who.volume = VolumeId([3; 16])),
        Some(BitmapOtherVolume)
    );
    for other in [
        shape(8192, 4096, 512),
        shape(3584, 4096, 512),
        shape(4096, 8192, 512),
        shape(4096, 4096, 1024),
    ] {
        assert_eq!(after(|_, who| who.geometry = other), Some(BitmapOtherSize));
    }
    assert_eq!(
        after(|s, _| s.marker = says(State::Open(None))),
        Some(TrackingInterrupted)
    );
    let rebooted = after(|s, who| {
        s.marker = says(State::Open(None));
        who.boot = BootId([2; 16]);
    });
    assert_eq!(rebooted, Some(UncleanShutdown));
    let told = after(|s, _| s.marker = says(State::Open(Some(TrackerSuspect))));
    assert_eq!(told, Some(TrackerSuspect));
    assert_eq!(after(|s, _| s.evidence = None), Some(ForeignWriteUnknown));
    let other = collect(&Raw(noise(8192, Seed(1))));
    assert_eq!(after(|s, _| s.evidence = Some(other)), Some(ForeignWrite));
    let consumed = blktide_format::bitmap_file::consumed(identity(1, 1).volume, LifeId([1; 16]));
    assert_eq!(
        after(|s, _| s.file = Found::Content(consumed.to_vec())),
        Some(BitmapStale)
    );
}

/// req A5: an older file of the same volume put back beside the newer marker, and one of another volume.
#[test]
fn an_older_or_foreign_file_is_not_believed() {
    let (disk, who) = (SimDisk::new(), identity(7, 1));
    store(&disk, disk.root(), who);
    let older = Found::Content(peek(&disk, disk.root(), Name::Bitmap).unwrap());
    assert_eq!(after(|s, _| s.file = older), Some(Reason::BitmapStale));
    let mut other = identity(1, 1);
    other.volume = VolumeId([8; 16]);
    store(&disk, disk.root(), other);
    let foreign = Found::Content(peek(&disk, disk.root(), Name::Bitmap).unwrap());
    assert_eq!(
        after(|s, _| s.file = foreign),
        Some(Reason::BitmapOtherVolume)
    );
}

/// req A5, X6: cut at each length, each single bit flipped: file and marker.
#[test]
fn no_damage_is_believed() {
    let whole = left();
    let who = identity(2, 1);
    for name in [Name::Marker, Name::Bitmap] {
        let good = bytes_of(if name == Name::Marker {
            &whole.marker
        } else {
            &whole.file
        });
        let judge = |bytes: Vec<u8>| {
            let mut situation = whole.clone();
            match name {
                Name::Marker => situation.marker = Found::Content(bytes),
                Name::Bitmap => situation.file = Found::Content(bytes),
            }
            reason(&situation, &who)
        };
        for len in 0..good.len() {
            assert_eq!(
                judge(good[..len].to_vec()),
                Some(Reason::BitmapDamaged),
                "{name:?} cut to {len}"
            );
        }
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(
                judge(bytes),
                Some(Reason::BitmapDamaged),
                "{name:?} bit {bit}"
            );
        }
        assert_eq!(judge(good), None);
    }
}

/// A raw device.
struct Raw(Vec<u8>);

impl ReadAt for Raw {
    fn len_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_exact_at(&self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset_bytes).unwrap();
        buf.copy_from_slice(&self.0[start..start + buf.len()]);
        Ok(())
    }
}

/// req A6: a raw volume is believed over a stop only if its administrator says that nobody else writes it.
#[test]
fn exclusive_waives_what_cannot_be_known_and_nothing_else() {
    let (disk, who) = (SimDisk::new(), identity(1, 1));
    let raw = collect(&Raw(noise(8192, Seed(1))));
    with(&disk, disk.root(), |f| {
        f.evidence = raw;
        let bitmap = Bitmap::Known {
            generations: generations(),
            distrust: None,
        };
        assert_eq!(stop(who, bitmap, f), Stored::Whole);
    });
    let content = |name| Found::Content(peek(&disk, disk.root(), name).unwrap());
    let judge = |evidence, exclusive| {
        let situation = Situation {
            marker: content(Name::Marker),
            file: content(Name::Bitmap),
            evidence: Some(evidence),
        };
        reason(
            &situation,
            &Identity {
                exclusive,
                ..identity(2, 1)
            },
        )
    };
    assert_eq!(judge(raw, false), Some(Reason::ForeignWriteUnknown));
    assert_eq!(judge(raw, true), None);
    assert_eq!(
        judge(Evidence::UNREADABLE, true),
        Some(Reason::ForeignWriteUnknown)
    );
    let written = collect(&Raw(noise(8192, Seed(2))));
    assert_eq!(judge(written, true), Some(Reason::ForeignWrite));
}

/// Attach and stop as their drivers run them: the file is used once, its distrust goes on, and names are kept.
#[test]
fn life_after_life() {
    let disk = SimDisk::new();
    let root = disk.root();
    let first = with(&disk, root, |f| attach(identity(1, 1), f)).unwrap();
    assert!(
        matches!(
            first,
            Begun::Anew {
                reason: Reason::BitmapMissing,
                ..
            }
        ),
        "{first:?}"
    );
    let owed = Some((Reason::UncleanShutdown, WallTime(5)));
    let bitmap = Bitmap::Known {
        generations: generations(),
        distrust: owed,
    };
    assert_eq!(
        with(&disk, root, |f| stop(identity(1, 1), bitmap, f)),
        Stored::Whole
    );
    let second = with(&disk, root, |f| attach(identity(2, 2), f)).unwrap();
    let expected = Begun::Continued {
        generations: generations(),
        distrust: owed,
    };
    assert_eq!(second, expected, "a full image is still owed");
    assert_eq!(peek(&disk, root, Name::Bitmap), None, "used, and gone");
    let third = with(&disk, root, |f| attach(identity(3, 2), f)).unwrap();
    assert!(
        matches!(
            third,
            Begun::Anew {
                reason: Reason::TrackingInterrupted,
                ..
            }
        ),
        "{third:?}"
    );
    let unknown = Bitmap::Unknown(Reason::ForeignWrite);
    assert_eq!(
        with(&disk, root, |f| stop(identity(3, 2), unknown, f)),
        Stored::Not
    );
    let fourth = with(&disk, root, |f| attach(identity(4, 3), f)).unwrap();
    assert!(
        matches!(
            fourth,
            Begun::Anew {
                reason: Reason::ForeignWrite,
                ..
            }
        ),
        "{fourth:?}"
    );
}

/// req A5, trap TB5: a state folder that fails. Served and distrusted while one witness is durable; else refused.
#[test]
fn a_failing_folder_distrusts_or_refuses() {
    let attach_with = |fault: Fault| {
        let disk = SimDisk::new();
        store(&disk, disk.root(), identity(1, 1));
        disk.fail(fault);
        with(&disk, disk.root(), |f| attach(identity(2, 1), f))
    };
    let fault = |kind, failure, sticky| Fault {
        kind: Some(kind),
        skip: 0,
        failure,
        sticky,
    };
    let interrupted = |begun| {
        matches!(
            begun,
            Ok(Begun::Anew {
                reason: Reason::TrackingInterrupted,
                ..
            })
        )
    };
    for kind in [Kind::Write, Kind::Sync] {
        assert!(
            interrupted(attach_with(fault(kind, Failure::Eio, false))),
            "{kind:?} once"
        );
    }
    assert!(
        interrupted(attach_with(fault(Kind::Write, Failure::Enospc, true))),
        "names can still go"
    );
    let refused = attach_with(fault(Kind::Sync, Failure::Eio, true));
    let Err(HandoverError::Refused { source }) = refused else {
        panic!("served: {refused:?}");
    };
    assert_eq!(source.raw_os_error(), Some(5));
    let unreadable = attach_with(fault(Kind::Read, Failure::Eio, true));
    assert!(
        matches!(
            unreadable,
            Ok(Begun::Anew {
                reason: Reason::BitmapDamaged,
                ..
            })
        ),
        "{unreadable:?}"
    );
}

/// req A5: before somebody writes the device past the tracker, its bitmap is forgotten, durably, at whatever step the power goes.
#[test]
fn forgotten_is_forgotten() {
    for skip in 0..10 {
        for sticky in [false, true] {
            let disk = SimDisk::new();
            store(&disk, disk.root(), identity(1, 1));
            disk.fail(Fault {
                kind: None,
                skip,
                failure: Failure::Eio,
                sticky,
            });
            let done = with(&disk, disk.root(), |f| {
                forget(&identity(0, 1), Reason::ForeignWrite, f)
            });
            if done.is_err() {
                continue;
            }
            for cut in disk.cuts(1 << 12, Seed(1)) {
                let left = disk.after(&cut);
                let begun = with(&left, left.root(), |f| attach(identity(2, 1), f)).unwrap();
                assert!(
                    matches!(begun, Begun::Anew { .. }),
                    "{skip} {sticky} {cut:?}: {begun:?}"
                );
            }
        }
    }
    let disk = SimDisk::new();
    store(&disk, disk.root(), identity(1, 1));
    with(&disk, disk.root(), |f| {
        forget(&identity(0, 1), Reason::ForeignWrite, f)
    })
    .unwrap();
    let begun = with(&disk, disk.root(), |f| attach(identity(2, 1), f)).unwrap();
    assert!(
        matches!(
            begun,
            Begun::Anew {
                reason: Reason::ForeignWrite,
                ..
            }
        ),
        "{begun:?}"
    );
}

/// A file that is longer than any of this volume's is read up to one byte more, and refused.
#[test]
fn the_longest_file_is_known() {
    let mut all = Vec::new();
    for number in 1..=64_u8 {
        all.push(StoredGeneration {
            name: GenerationName([number; 16]),
            counter: 0,
            opened: WallTime(0),
            words: vec![u64::from(number)],
        });
    }
    let disk = SimDisk::new();
    let who = identity(1, 1);
    let bitmap = Bitmap::Known {
        generations: all,
        distrust: None,
    };
    assert_eq!(
        with(&disk, disk.root(), |f| stop(who, bitmap, f)),
        Stored::Whole
    );
    let file = with(&disk, disk.root(), |f| f.read(Name::Bitmap, 10_000))
        .unwrap()
        .unwrap();
    assert_eq!(file.len() as u64, who.file_bytes_max());
}
