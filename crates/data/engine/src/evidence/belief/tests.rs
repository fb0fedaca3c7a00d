//! Each check alone, the order of a sample's two counts, what is proven later, and deaths while a sample is stored.

use super::*;
use crate::PlainMemory;
use crate::broken::cut_after;
use blktide_testkit::seed::Seed;
use blktide_types::reason::Reason;
use std::collections::BTreeSet;

const PLACES: [usize; 2] = [watch::SAMPLE_0, watch::SAMPLE_1];

/// A quiet sample in the middle of a life.
fn quiet() -> Vector {
    let sectors = |written, discarded| Sectors { written, discarded };
    Vector {
        boot: BootId([7; 16]),
        programs: [11, 12, 13],
        links: [21, 22, 23],
        misses: 3,
        lost: 1,
        passthrough: 2,
        events: 500,
        generation: 40,
        own: sectors(800, 64),
        queued: sectors(900, 60),
        kernel: sectors(10_800, 164),
        base: sectors(10_000, 100),
        queued_base: sectors(9_900, 104),
        sectors: 1 << 20,
        start_sector: 2048,
        device: 259 << 32,
        holders: 0,
        statistics: true,
    }
}

/// `quiet`, some writes later.
fn later(written: u64, under_way: u64) -> Vector {
    let mut vector = quiet();
    vector.own.written += written;
    vector.queued.written += written;
    vector.kernel.written += written - under_way;
    vector.events += 3;
    vector.generation += 1;
    vector
}

type Change = fn(&mut Vector);

const ALONE: &[(Check, Change)] = &[
    (Check::OtherBoot, |v| v.boot = BootId([8; 16])),
    (Check::DeviceMoved, |v| v.device += 16),
    (Check::DeviceMoved, |v| v.start_sector += 1),
    (Check::DeviceResized, |v| v.sectors += 8),
    (Check::DeviceResized, |v| v.sectors -= 8),
    (Check::LinksGone, |v| v.links[0] = 0),
    (Check::LinksGone, |v| v.links[2] = 0),
    (Check::LinksGone, |v| v.links[1] = 99),
    (Check::ProgramsChanged, |v| v.programs[0] = 99),
    (Check::ProgramsChanged, |v| v.programs[2] = 0),
    (Check::CountRestarted, |v| v.base.written += 8),
    (Check::CountRestarted, |v| v.base.discarded -= 8),
    (Check::CountRestarted, |v| v.queued_base.written += 8),
    (Check::CountRestarted, |v| v.queued_base.discarded -= 8),
    (Check::StatisticsOff, |v| v.statistics = false),
    (Check::Stacked, |v| v.holders = 1),
    (Check::WentBackwards, |v| v.misses -= 1),
    (Check::WentBackwards, |v| v.lost -= 1),
    (Check::WentBackwards, |v| v.passthrough -= 1),
    (Check::WentBackwards, |v| v.events = 499),
    (Check::WentBackwards, |v| v.generation = 39),
    (Check::WentBackwards, |v| v.own.written = 799),
    (Check::WentBackwards, |v| v.own.discarded -= 1),
    (Check::WentBackwards, |v| v.queued.written = 899),
    (Check::WentBackwards, |v| v.queued.discarded -= 1),
    (Check::WentBackwards, |v| v.kernel.written = 10_799),
    (Check::WentBackwards, |v| v.kernel.discarded -= 1),
    (Check::MarksLost, |v| v.lost += 1),
    (Check::RunsSkipped, |v| v.misses += 1),
    (Check::Passthrough, |v| v.passthrough += 1),
    (Check::SectorsUnseen, |v| v.kernel.written += 1),
    (Check::SectorsUnseen, |v| v.kernel.discarded += 1),
    // Too many of one kind do not make up for the other.
    (Check::SectorsUnseen, |v| {
        v.kernel.written += 8;
        v.own.discarded += 8;
    }),
    // Nor does each count that lacks something of another kind.
    (Check::SectorsUnseen, |v| {
        v.own.written -= 8;
        v.queued.written -= 16;
    }),
];

/// req X9: each check is fired by its own field, by nothing else, and it stays.
#[test]
fn every_check_fires_alone() {
    let before = quiet();
    let now = later(16, 0);
    assert_eq!(compare(&before, &now), Ok(Proof::Proven));
    let mut fired = BTreeSet::from([Check::SampleMissing.number()]);
    for (check, change) in ALONE {
        let mut changed = now;
        change(&mut changed);
        assert_eq!(compare(&before, &changed), Err(*check), "{changed:?}");
        fired.insert(check.number());
        let mut belief = Belief::begin(&before).unwrap();
        for sample in [changed, now] {
            let outcome = belief.sample(Some(&sample), Occasion::Between);
            assert_eq!(outcome, Err(*check));
        }
        assert_eq!((belief.doubt(), belief.last()), (Some(*check), &before));
    }
    let mut belief = Belief::begin(&before).unwrap();
    let missing = Err(Check::SampleMissing);
    assert_eq!(belief.sample(None, Occasion::Between), missing);
    assert_eq!(belief.sample(Some(&now), Occasion::Closing), missing);
    assert_eq!(fired.len(), Check::ALL.len());
}

/// Each has a word, a number and a sentence of its own; a missed sector is a suspicion against the tracker.
#[test]
fn checks_have_names() {
    let words: BTreeSet<_> = Check::ALL.iter().map(|c| c.code()).collect();
    let sentences: BTreeSet<_> = Check::ALL.iter().map(|c| c.what()).collect();
    assert_eq!(
        (words.len(), sentences.len()),
        (Check::ALL.len(), words.len())
    );
    for check in Check::ALL {
        assert_eq!(Check::from_number(check.number().into()), Some(*check));
        let others = [
            (Check::DeviceResized, Reason::Resized),
            (Check::DeviceMoved, Reason::DeviceChanged),
            (Check::SectorsUnseen, Reason::TrackerSuspect),
        ];
        let other = others.iter().find(|(other, _)| other == check);
        let reason = other.map_or(Reason::TrackingInterrupted, |(_, reason)| *reason);
        assert_eq!(check.reason(), reason, "{check}");
    }
    assert_eq!(Check::from_number(0), None);
}

/// A life cannot begin with evidence that fails by itself.
#[test]
fn nothing_is_believed_of_a_bad_beginning() {
    for (check, change) in [
        (Check::LinksGone, (|v| v.links = [0; 3]) as Change),
        (Check::ProgramsChanged, |v| v.programs[0] = 0),
        (Check::StatisticsOff, |v| v.statistics = false),
        (Check::Stacked, |v| v.holders = 1),
        (Check::SectorsUnseen, |v| {
            (v.base.written, v.queued_base.written) = (0, 0);
        }),
        (Check::WentBackwards, |v| v.base.written = 10_801),
        (Check::WentBackwards, |v| v.queued_base.discarded = 165),
    ] {
        let mut first = quiet();
        change(&mut first);
        assert_eq!(Belief::begin(&first), Err(check));
    }
}

/// A device under load: requests complete at any moment, each is counted by us first and by the kernel a little later.
struct Device {
    own: u64,
    kernel: u64,
    events: u64,
}

impl Device {
    fn go_on(&mut self, numbers: &mut impl FnMut(u64) -> u64) {
        self.kernel += numbers(self.own - self.kernel + 1);
        self.own += 8 * numbers(4);
        self.events += 1;
    }
}

/// P14: the kernel's count first, ours after. In this order load is never taken for a miss, and a miss of one sector is seen at the first
/// quiet sample at the latest. In the other order load is taken for a miss.
#[test]
fn the_kernels_count_is_read_first() {
    let mut seed = Seed::of_test("order").numbers();
    let mut below = |n: u64| seed.below(n);
    let mut wrong_order_failed = false;
    for _ in 0..300 {
        let mut device = Device {
            own: 0,
            kernel: 0,
            events: 0,
        };
        let start = Vector {
            own: Sectors::default(),
            queued: Sectors::default(),
            kernel: Sectors::default(),
            base: Sectors::default(),
            queued_base: Sectors::default(),
            events: 0,
            ..quiet()
        };
        let mut belief = Belief::begin(&start).unwrap();
        for _ in 0..20 {
            let kernel = device.kernel;
            let own_before = device.own;
            for _ in 0..below(3) {
                device.go_on(&mut below);
            }
            let mut now = start;
            (now.own.written, now.kernel.written) = (device.own, kernel);
            now.queued = now.own;
            now.events = device.events;
            belief.sample(Some(&now), Occasion::Between).unwrap();
            (now.own.written, now.kernel.written) = (own_before, device.kernel);
            now.queued = now.own;
            wrong_order_failed |= compare(&start, &now) == Err(Check::SectorsUnseen);
        }
        let missed = below(2);
        let mut now = *belief.last();
        now.own.written = device.own;
        now.queued = now.own;
        now.kernel.written = device.own + missed;
        let outcome = belief.sample(Some(&now), Occasion::Pause);
        assert_eq!(outcome.map(|v| v.proof).is_ok(), missed == 0);
        if missed == 0 {
            assert_eq!(outcome.unwrap().proof, Proof::Proven);
        }
    }
    assert!(wrong_order_failed);
}

/// The base is that of the quietest sample at the attach.
#[test]
fn the_base_is_found_under_load() {
    let mut first = Vector {
        base: Sectors::default(),
        ..quiet()
    };
    // Own is ahead by what is under way; the third has nothing under way.
    for (own, kernel) in [(8, 5_000), (40, 5_016), (64, 5_064), (96, 5_080)] {
        let mut sample = first;
        (sample.own.written, sample.kernel.written) = (own, kernel);
        (sample.own.discarded, sample.kernel.discarded) = (8, 0);
        first.calibrate(&sample);
    }
    assert_eq!(first.base.written, 5_000);
    assert_eq!(first.base.discarded, 0, "never less than nothing");
}

/// P14: nothing under way at the swap, or a quiet moment between this swap and the next: proven. If not, the next image compares
/// digests.
#[test]
fn provisional_and_later_proven() {
    use Occasion::{Between, Closing, Pause, Still};
    let mut belief = Belief::begin(&quiet()).unwrap();
    let mut take = |written, under_way, occasion| {
        let verdict = belief.sample(Some(&later(written, under_way)), occasion);
        let verdict = verdict.unwrap();
        (verdict.proof, verdict.owes_digests, belief.open_question())
    };
    let (proven, provisional) = (Proof::Proven, Proof::Provisional);
    // Inside a freeze.
    assert_eq!(take(8, 0, Still), (proven, false, false));
    // Something under way between two instants is nobody's business.
    assert_eq!(take(16, 8, Between), (provisional, false, false));
    // Closed while writers go on; equal counts may be chance, unless they stand still.
    assert_eq!(take(24, 0, Closing), (proven, false, true));
    assert_eq!(take(32, 0, Between), (proven, false, true));
    assert_eq!(take(40, 8, Between), (provisional, false, true));
    assert_eq!(take(48, 0, Pause), (proven, false, false));
    // Proven by the sample of the next swap, inside a freeze.
    assert_eq!(take(56, 8, Closing), (provisional, false, true));
    assert_eq!(take(64, 0, Still), (proven, false, false));
    // Never proven in between: this image owes digests, and so does each that follows, until one moment is quiet.
    assert_eq!(take(72, 8, Closing), (provisional, false, true));
    assert_eq!(take(88, 0, Closing), (proven, true, true));
    assert_eq!(take(96, 8, Closing), (provisional, true, true));
    assert_eq!(take(104, 0, Pause), (proven, false, false));
    // Something got past a freeze.
    assert_eq!(take(112, 8, Still), (provisional, false, true));
}

/// P14: completions that went unseen leave the marks believed where nothing was under way at the swap, and nowhere else.
#[test]
fn unseen_completions_cost_only_what_was_under_way() {
    use Occasion::{Between, Closing, Pause, Still};
    let mut belief = Belief::begin(&quiet()).unwrap();
    let mut take = |written, (unseen, under_way), occasion| {
        let mut now = later(written, under_way);
        now.own.written -= unseen;
        let verdict = belief.sample(Some(&now), occasion).unwrap();
        (verdict.proof, verdict.owes_digests, belief.open_question())
    };
    let (proven, queued) = (Proof::Proven, Proof::Queued);
    assert_eq!(take(8, (0, 0), Still), (proven, false, false));
    assert_eq!(take(16, (8, 0), Still), (queued, false, false));
    assert_eq!(take(24, (8, 0), Between), (queued, false, false));
    assert_eq!(take(32, (8, 0), Pause), (queued, false, false));
    assert_eq!(take(40, (8, 0), Still), (queued, false, false));
    // What falls between the two counts makes up for what is missing: equal, and no proof.
    assert_eq!(take(48, (8, 8), Closing), (proven, false, true));
    assert_eq!(take(56, (8, 8), Between), (proven, false, true));
    // What this one closed hangs on completions, and some are missing for ever.
    assert_eq!(take(64, (8, 0), Pause), (queued, false, true));
    assert_eq!(take(72, (8, 0), Still), (queued, true, true));
}

/// What is queued and fails before it reaches the device is in our count of what is queued for ever: completions prove the rest.
#[test]
fn a_write_that_never_reached_the_device_costs_nothing() {
    let mut belief = Belief::begin(&quiet()).unwrap();
    let mut now = later(8, 0);
    now.queued.written += 128;
    let verdict = belief.sample(Some(&now), Occasion::Still).unwrap();
    assert_eq!(verdict.proof, Proof::Proven);
}

/// What is stored comes back; each flipped bit is seen; two places.
#[test]
fn a_stored_sample_checks() {
    let head = PlainMemory::new(watch::WORDS);
    assert_eq!(Belief::load(&*head), Err(Check::SampleMissing), "zeroes");
    let mut belief = Belief::begin(&quiet()).unwrap();
    belief.save(&*head);
    assert_eq!(Belief::load(&*head), Ok(belief));
    for check in Check::ALL {
        belief.doubt = Some(*check);
        belief.open_question = check.number() % 2 == 0;
        belief.save(&*head);
        assert_eq!(Belief::load(&*head), Ok(belief));
    }
    let before = Belief::load(&*head).unwrap();
    let newest = PLACES[usize::from(before.sequence & 1 == 1)];
    for index in newest..newest + sample::WORDS {
        for bit in 0..64 {
            head.words()[index].fetch_xor(1 << bit, Ordering::Relaxed);
            let found = Belief::load(&*head).unwrap();
            assert_eq!(found.sequence, before.sequence - 1, "{index}.{bit}");
            head.words()[index].fetch_xor(1 << bit, Ordering::Relaxed);
        }
    }
    for place in PLACES {
        head.words()[place + sample::OWN_WRITTEN].fetch_xor(1, Ordering::Relaxed);
    }
    assert_eq!(Belief::load(&*head), Err(Check::SampleMissing));
    assert_eq!(
        Belief::load(&*PlainMemory::new(70)),
        Err(Check::SampleMissing)
    );
}

/// req X9: a death before any store of a sample leaves the sample before it, whole.
#[test]
fn a_death_while_a_sample_is_stored_leaves_the_one_before() {
    for stores in 0.. {
        let head = PlainMemory::new(watch::WORDS);
        let mut belief = Belief::begin(&quiet()).unwrap();
        for written in [8, 16, 24] {
            belief
                .sample(Some(&later(written, 0)), Occasion::Between)
                .unwrap();
            belief.save(&*head);
        }
        let before = belief;
        let newest = later(32, 8);
        belief.sample(Some(&newest), Occasion::Closing).unwrap();
        let ended = cut_after(stores, || belief.save(&*head));
        let mut found = Belief::load(&*head).unwrap();
        if ended {
            assert_eq!(found, belief);
            return;
        }
        assert_eq!(found, before, "{stores}");
        let verdict = found.sample(Some(&newest), Occasion::Closing).unwrap();
        assert_eq!(verdict.proof, Proof::Provisional);
    }
}
