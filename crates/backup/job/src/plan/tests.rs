//! The table of the module's head, exhaustively.

use super::*;
use blktide_types::unit::BlockSize;

const HERE: HostId = HostId([1; 16]);
const ELSEWHERE: HostId = HostId([2; 16]);
const IMAGE: ImageId = ImageId([3; 16]);
const NEWER: ImageId = ImageId([4; 16]);

fn geometry(bytes: u64, block: u32, sector: u32) -> Geometry {
    Geometry::new(
        bytes,
        BlockSize::new(block).unwrap(),
        BlockSize::new(4096).unwrap(),
        sector,
        4096,
    )
    .unwrap()
}

fn now() -> Geometry {
    geometry(1 << 24, 65536, 512)
}

/// Everything that a plan can meet, one bit each; bit set = the thing is wrong.
struct World {
    facts: PlanFacts,
    tracker: TrackerSays,
}

fn worlds() -> impl Iterator<Item = (u32, World)> {
    let trackers = [
        TrackerSays::Resolved,
        TrackerSays::Unresolved,
        TrackerSays::Off,
    ]
    .into_iter()
    .chain(Reason::ALL.iter().map(|r| TrackerSays::Distrusted(*r)));
    trackers
        .flat_map(|tracker| (0_u32..1 << 11).map(move |bits| (bits, tracker)))
        .map(|(bits, tracker)| {
            let wrong = |bit: u32| bits >> bit & 1 == 1;
            let then = geometry(
                if wrong(0) { 1 << 23 } else { 1 << 24 },
                if wrong(1) { 4096 } else { 65536 },
                if wrong(2) { 4096 } else { 512 },
            );
            let base = (!wrong(3)).then_some(BaseFacts {
                image: IMAGE,
                host: if wrong(4) { ELSEWHERE } else { HERE },
                geometry: then,
                device: if wrong(7) { "wwn-2" } else { "wwn-1" }.into(),
                generation: if wrong(10) {
                    GenerationName::NONE
                } else {
                    GenerationName([9; 16])
                },
            });
            let facts = PlanFacts {
                full_asked: wrong(5),
                host: HERE,
                geometry: now(),
                device: "wwn-1".into(),
                repository: RepositoryFacts {
                    newest: match base {
                        Some(base) => Newest::Usable(base),
                        None if wrong(6) => Newest::None,
                        None => Newest::Unusable,
                    },
                    newest_host: Some(if wrong(8) { ELSEWHERE } else { HERE }),
                },
                remembered: Some(if wrong(9) { NEWER } else { IMAGE }),
            };
            (bits, World { facts, tracker })
        })
}

/// The table, written down a second time, as one match.
fn by_the_table(bits: u32, world: &World) -> Option<Reason> {
    let wrong = |bit: u32| bits >> bit & 1 == 1;
    let has_base = !wrong(3);
    let rows: [(bool, Reason); 7] = [
        (wrong(5), Reason::Asked),
        (wrong(8), Reason::CloneDetected),
        (!has_base, Reason::BaseImageGone),
        (wrong(4), Reason::CloneDetected),
        (wrong(1), Reason::BlockSizeChanged),
        (wrong(0), Reason::Resized),
        (wrong(2) || wrong(7), Reason::DeviceChanged),
    ];
    if let Some((_, reason)) = rows.iter().find(|(holds, _)| *holds) {
        return Some(*reason);
    }
    match world.tracker {
        TrackerSays::Distrusted(reason) => Some(reason),
        TrackerSays::Off => Some(Reason::TrackingInterrupted),
        TrackerSays::Unresolved if wrong(9) => Some(Reason::BaseImageGone),
        TrackerSays::Unresolved => Some(Reason::BitmapStale),
        TrackerSays::Resolved => wrong(10).then_some(Reason::BitmapStale),
    }
}

/// req A5, A6: whatever is in doubt, the backup is full and says why; only with nothing in doubt it is incremental.
#[test]
fn every_world_gives_the_reason_of_the_table() {
    for (bits, world) in worlds() {
        let plan = plan(&world.facts, world.tracker, 65536);
        assert_eq!(
            plan.reason,
            by_the_table(bits, &world),
            "{bits:011b} {:?}",
            world.tracker
        );
        let incremental = plan.kind == ImageKind::Incremental;
        assert_eq!(incremental, plan.reason.is_none());
        assert_eq!(incremental, plan.base.is_some());
        assert_eq!(
            plan.read_bytes,
            if incremental { 65536 } else { 1 << 24 },
            "a full backup reads everything"
        );
        assert!(plan.stored_bytes_max > plan.read_bytes);
        if incremental {
            assert!(matches!(world.tracker, TrackerSays::Resolved));
            let base = plan.base.unwrap();
            assert_eq!((base.host, base.geometry), (HERE, now()));
        }
    }
}

/// trap TG5: a volume that the repository has never seen is full for itself alone, whatever else is wrong.
#[test]
fn nothing_there_and_nothing_remembered_is_the_first_backup() {
    for (_, mut world) in worlds() {
        world.facts.repository = RepositoryFacts {
            newest: Newest::None,
            newest_host: None,
        };
        world.facts.remembered = None;
        assert_eq!(
            plan(&world.facts, world.tracker, 0).reason,
            Some(Reason::FirstBackup)
        );
        world.facts.remembered = Some(IMAGE);
        world.facts.full_asked = false;
        assert_eq!(
            plan(&world.facts, world.tracker, 0).reason,
            Some(Reason::BaseImageGone),
            "an emptied repository"
        );
    }
}
