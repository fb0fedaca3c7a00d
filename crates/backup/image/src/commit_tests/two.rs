//! Two backups of one volume at once: every order of their turns, with a crash or a lost reply at every step.
//!
//! A turn is what one of them does up to its next creation outside packs, or its next listing before it has a claim: only
//! these can be seen by, or see, the other (what a claim's holder lists lies below its number and is fixed; packs are its own).
//! A crash before a listing is the crash before the next creation. Orders are tried one after another, depth first; a run is the
//! list of its choices, which a failure prints. Ends that have been judged before are not judged again.

use super::cut::{check, shape, truth};
use crate::testing::{VOLUME, facts, request, words};
use crate::{Committed, Content, ImageError, ImageReader, ImageWriter};
use blktide_format::manifest::ImageKind;
use blktide_repo::{
    ClaimState, Created, MemoryStore, RepoError, Repository, Store, StoreError, Upload,
};
use blktide_testkit::clock::TestRandom;
use blktide_testkit::seed::Seed;
use blktide_types::clock::WallTime;
use blktide_types::id::HostId;
use blktide_types::set::BlockSet;
use blktide_types::unit::BlockIndex;
use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Condvar, Mutex};

/// What comes of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It is done.
    Done,
    /// The process dies before it.
    Dies,
    /// It is done, and its reply is lost.
    ReplyLost,
}

/// What a run may have, beside the order of turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mistake {
    Nothing,
    /// The store replaces what is there.
    Replaces,
    /// The listing is always empty.
    ListsNothing,
}

/// What one of the two is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    List,
    Create,
}

#[derive(Default)]
struct Turns {
    waiting: [Option<Act>; 2],
    claimed: [bool; 2],
    over: [bool; 2],
    dead: [bool; 2],
    granted: Option<(usize, Fate)>,
}

/// Picks whose turn it is, and what comes of it, out of what can be.
type Choose<'a> = dyn FnMut(&[(usize, Fate)]) -> (usize, Fate) + 'a;

#[derive(Default)]
struct Gate {
    turns: Mutex<Turns>,
    changed: Condvar,
}

impl Gate {
    /// Waits for the turn of `who`.
    fn pass(&self, who: usize, act: Act) -> Fate {
        let mut turns = self.turns.lock().unwrap();
        if turns.dead[who] {
            return Fate::Dies;
        }
        if act == Act::List && turns.claimed[who] {
            return Fate::Done;
        }
        turns.claimed[who] |= act == Act::Create;
        turns.waiting[who] = Some(act);
        self.changed.notify_all();
        loop {
            match turns.granted {
                Some((w, fate)) if w == who => {
                    turns.granted = None;
                    turns.waiting[who] = None;
                    turns.dead[who] = fate == Fate::Dies;
                    return fate;
                }
                _ => turns = self.changed.wait(turns).unwrap(),
            }
        }
    }

    fn over(&self, who: usize) {
        self.turns.lock().unwrap().over[who] = true;
        self.changed.notify_all();
    }

    /// Lets each run to its next turn and asks `choose` whose it is, until both are over.
    fn direct(&self, choose: &mut Choose<'_>) {
        loop {
            let mut turns = self.turns.lock().unwrap();
            while turns.granted.is_some()
                || (0..2).any(|w| turns.waiting[w].is_none() && !turns.over[w])
            {
                turns = self.changed.wait(turns).unwrap();
            }
            let mut ready = Vec::new();
            for who in 0..2 {
                ready.extend(turns.waiting[who].map(|_| (who, Fate::Done)));
                if turns.waiting[who] == Some(Act::Create) {
                    ready.extend([(who, Fate::Dies), (who, Fate::ReplyLost)]);
                }
            }
            if ready.is_empty() {
                return;
            }
            turns.granted = Some(choose(&ready));
            self.changed.notify_all();
        }
    }
}

/// The store as one of the two sees it.
struct Gated {
    store: MemoryStore,
    gate: Arc<Gate>,
    who: usize,
    mistake: Mistake,
}

impl Gated {
    fn alive(&self) -> Result<(), StoreError> {
        let dead = self.gate.turns.lock().unwrap().dead[self.who];
        if dead { Err(gone()) } else { Ok(()) }
    }
}

fn gone() -> StoreError {
    StoreError::Io(io::ErrorKind::BrokenPipe.into())
}

impl Store for Gated {
    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created, StoreError> {
        let fate = self.gate.pass(self.who, Act::Create);
        if fate == Fate::Dies {
            return Err(gone());
        }
        if self.mistake == Mistake::Replaces {
            self.store.put(name, None);
        }
        let created = self.store.create(name, bytes);
        if fate == Fate::ReplyLost {
            return Err(gone());
        }
        created
    }
    fn upload(&self, name: &str) -> Result<Box<dyn Upload>, StoreError> {
        self.alive()?;
        self.store.upload(name)
    }
    fn get(&self, name: &str, offset_bytes: u64, buf: &mut [u8]) -> Result<usize, StoreError> {
        self.alive()?;
        self.store.get(name, offset_bytes, buf)
    }
    fn size(&self, name: &str) -> Result<Option<u64>, StoreError> {
        self.alive()?;
        self.store.size(name)
    }
    fn list(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        if self.gate.pass(self.who, Act::List) == Fate::Dies {
            return Err(gone());
        }
        if self.mistake == Mistake::ListsNothing {
            return Ok(Vec::new());
        }
        self.store.list(folder)
    }
    fn delete(&self, name: &str) -> Result<(), StoreError> {
        self.alive()?;
        self.store.delete(name)
    }
}

/// One backup of `truth(n)` by `host`, as a job does it.
fn backup(repository: &Repository, n: u8, host: HostId) -> Result<Committed, ImageError> {
    let random = TestRandom::new(Seed(1000 + u64::from(n)));
    let latest = repository.latest(VOLUME)?;
    let mut asked = request(latest.as_ref().map(|e| (e.head.image, e.head.sequence)));
    asked.host = host;
    let session = repository.claim(&asked, &random)?;
    let is_clone = session.neighbour().is_some_and(|h| h != host);
    let base = match &latest {
        Some(entry) if !is_clone && entry.head.host == host => {
            Some(Arc::new(ImageReader::open_base(repository, entry)?))
        }
        _ => None,
    };
    let kind = match base {
        Some(_) => ImageKind::Incremental,
        None => ImageKind::Full,
    };
    let mut wanted = BlockSet::full(shape().block_count());
    if base.is_some() {
        wanted.remove(BlockIndex(0));
    }
    let writer = ImageWriter::new(session, shape(), base, &words(&wanted))?;
    let volume = truth(n);
    let all = || -> Result<Committed, ImageError> {
        for block in wanted.blocks() {
            let at = usize::try_from(block.0).unwrap() * 4096;
            writer.put(&[(block, Content::Bytes(&volume[at..at + 4096]))])?;
        }
        writer.commit(&facts(kind, None))
    };
    all().or_else(|e| match writer.abandon(WallTime(3)) {
        // The reply of the commit was lost: it is an image after all.
        Ok(false) => {
            let entry = repository
                .image(VOLUME, writer.session().facts().sequence)?
                .unwrap();
            Ok(Committed {
                head: entry.head,
                digest: entry.digest,
            })
        }
        Ok(true) | Err(_) => Err(e),
    })
}

/// What the two do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum World {
    /// Two backups by one machine.
    OneHost,
    /// Two machines with the same volume: a clone.
    TwoHosts,
    /// A backup, and somebody who gives its claim up.
    Unlock,
}

/// Looks for the claim a few times, and gives it up when it is there.
fn unlock(repository: &Repository) -> Option<Result<(), RepoError>> {
    let is_there = |_: &u8| repository.sequences(VOLUME).is_ok_and(|s| s.contains(&2));
    (0..4_u8)
        .find(is_there)
        .map(|_| repository.abandon(VOLUME, 2, WallTime(5)))
}

struct Outcome {
    done: [Option<Result<Committed, ImageError>>; 2],
    unlocked: Option<Result<(), RepoError>>,
}

fn host(n: u8) -> HostId {
    HostId([n; 16])
}

/// One run. `choose` decides.
fn run(
    start: &MemoryStore,
    world: World,
    mistake: Mistake,
    choose: &mut Choose<'_>,
) -> (MemoryStore, Outcome) {
    let store = start.fork();
    let gate = Arc::new(Gate::default());
    let open = |who| {
        // Opening reads the repository's object only: no turn.
        Repository::open(Arc::new(Gated {
            store: store.clone(),
            gate: Arc::clone(&gate),
            who,
            mistake,
        }))
        .unwrap()
    };
    let (first, second) = (open(0), open(1));
    let mut outcome = Outcome {
        done: [None, None],
        unlocked: None,
    };
    std::thread::scope(|scope| {
        let one = scope.spawn(|| {
            let done = backup(&first, 2, host(3));
            gate.over(0);
            done
        });
        let two = scope.spawn(|| {
            let result = match world {
                World::OneHost => (Some(backup(&second, 3, host(3))), None),
                World::TwoHosts => (Some(backup(&second, 3, host(4))), None),
                World::Unlock => (None, unlock(&second)),
            };
            gate.over(1);
            result
        });
        gate.direct(choose);
        outcome.done[0] = Some(one.join().unwrap());
        (outcome.done[1], outcome.unlocked) = two.join().unwrap();
    });
    (store, outcome)
}

/// Panics unless what lies in the store and what the two were told fit.
fn judge(store: &MemoryStore, outcome: &Outcome, at: &str) {
    let repository = Repository::open(Arc::new(store.clone())).unwrap();
    let mut sure = vec![(1, 1)];
    for (done, n) in outcome.done.iter().zip([2, 3]) {
        if let Some(Ok(done)) = done {
            let same = sure.iter().any(|(s, _)| *s == done.head.sequence);
            assert!(!same, "{at}: two images of number {}", done.head.sequence);
            sure.push((done.head.sequence, n));
        }
    }
    check(&repository, &sure, at);
    let claims = repository.claims(VOLUME).unwrap();
    for entry in repository.images().unwrap().images {
        let Some((_, base)) = entry.head.base else {
            continue;
        };
        // Between an image and its base no other machine has claimed: else its tracker may be another's.
        let between = claims
            .iter()
            .filter(|c| (base..entry.head.sequence).contains(&c.facts.sequence));
        for claim in between {
            assert_eq!(
                claim.facts.host, entry.head.host,
                "{at}: shares with a clone"
            );
        }
    }
    if let Some(unlocked) = &outcome.unlocked {
        let is_image = matches!(outcome.done[0], Some(Ok(_)));
        assert!(!(is_image && unlocked.is_ok()), "{at}: both ends were told");
        let given_up = claims.iter().any(|c| c.state == ClaimState::Abandoned);
        assert!(
            unlocked.is_err() || given_up,
            "{at}: an end that is not there"
        );
    }
    // Whoever comes next: dead claims go, a new image comes.
    repository
        .abandon_dead(VOLUME, host(3), WallTime(9), &|_| false)
        .unwrap();
    let next = backup(&repository, 4, host(3)).unwrap();
    sure.push((next.head.sequence, 4));
    check(&repository, &sure, at);
}

/// All that a run leaves: what lies in the store, and what the two were told.
fn end_of(store: &MemoryStore, outcome: &Outcome) -> String {
    let objects: Vec<_> = store
        .names()
        .into_iter()
        .map(|n| blake3::hash(&store.bytes(&n)).to_hex().to_string() + &n)
        .collect();
    format!("{objects:?} {:?} {:?}", outcome.done, outcome.unlocked)
}

/// Every order of turns with at most one crash or lost reply. The number of runs and of ends, or what was found.
fn explore(world: World, mistake: Mistake) -> Result<(u64, usize), String> {
    let start = MemoryStore::new();
    let random = TestRandom::new(Seed(999));
    let repository = Repository::init(Arc::new(start.clone()), &random, WallTime(1)).unwrap();
    backup(&repository, 1, host(3)).unwrap();
    let mut path: Vec<(usize, usize)> = Vec::new();
    let mut judged = BTreeSet::new();
    for runs in 1.. {
        let (mut depth, mut is_hurt) = (0, false);
        let mut told = Vec::new();
        let (store, outcome) = run(&start, world, mistake, &mut |ready| {
            let ready: Vec<_> = ready
                .iter()
                .filter(|(_, fate)| !is_hurt || *fate == Fate::Done)
                .collect();
            if depth == path.len() {
                path.push((0, ready.len()));
            }
            let (choice, of) = path[depth];
            assert_eq!(of, ready.len(), "a run does not repeat");
            depth += 1;
            is_hurt |= ready[choice].1 != Fate::Done;
            told.push(*ready[choice]);
            *ready[choice]
        });
        let at = format!("{world:?} {mistake:?} {told:?}");
        if judged.insert(end_of(&store, &outcome)) {
            let judge = || judge(&store, &outcome, &at);
            if let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(judge)) {
                return Err(panic.downcast_ref::<String>().cloned().unwrap_or(at));
            }
        }
        while let Some((choice, of)) = path.pop() {
            if choice + 1 < of {
                path.push((choice + 1, of));
                break;
            }
        }
        if path.is_empty() {
            return Ok((runs, judged.len()));
        }
    }
    Err("no end".to_owned())
}

/// The small worlds of P13 without prune. trap TG1, TG3
#[test]
fn two_at_once_in_every_order_with_every_crash() {
    for (world, mistake) in [
        (World::OneHost, Mistake::Nothing),
        (World::OneHost, Mistake::ListsNothing),
        (World::TwoHosts, Mistake::Nothing),
        (World::Unlock, Mistake::Nothing),
    ] {
        let (runs, ends) = explore(world, mistake).unwrap();
        println!("{world:?} {mistake:?}: {runs} runs, {ends} ends");
    }
}

/// rename(2) in place of link(2), or a store whose create replaces: two images of one number.
#[test]
fn a_store_that_replaces_is_found_out() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let found = explore(World::OneHost, Mistake::Replaces);
    std::panic::set_hook(hook);
    println!("{found:?}");
    assert!(found.is_err(), "a store that replaces was not found out");
}
