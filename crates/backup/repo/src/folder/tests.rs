//! The store in a real folder, and packs in it by several threads.

use super::FolderStore;
use crate::{
    ClaimRequest, ClaimState, Created, NewEntry, ProcessMark, RepoError, Repository, Store,
    StoreError,
};
use blktide_format::entry::{self, Codec, EntryKind};
use blktide_testkit::clock::TestRandom;
use blktide_testkit::pattern::noise;
use blktide_testkit::seed::Seed;
use blktide_types::clock::WallTime;
use blktide_types::id::{BootId, Digest, GenerationName, HostId, ImageId, VolumeId};
use std::path::PathBuf;
use std::sync::Arc;

const VOLUME: VolumeId = VolumeId([7; 16]);

/// A folder of its own, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("blktide-repo-{name}-{}", std::process::id()));
        drop(std::fs::remove_dir_all(&path));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn store(&self) -> Arc<FolderStore> {
        Arc::new(FolderStore::new(&self.0))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

fn request(host: u8) -> ClaimRequest {
    ClaimRequest {
        volume: VOLUME,
        volume_name: "data".to_owned(),
        host: HostId([host; 16]),
        host_name: "web1".to_owned(),
        process: ProcessMark {
            boot: BootId([1; 16]),
            pid: u32::from(host),
            start_time: 9,
        },
        base: None,
        generation: GenerationName([2; 16]),
        now: WallTime(5),
    }
}

/// The oracle is the file system itself.
#[test]
fn an_object_is_a_file_that_is_never_replaced() {
    let folder = Folder::new("object");
    let store = folder.store();
    assert_eq!(store.create("a/b/one", b"first").unwrap(), Created::New);
    assert_eq!(
        store.create("a/b/one", b"second").unwrap(),
        Created::Existed
    );
    assert_eq!(std::fs::read(folder.0.join("a/b/one")).unwrap(), b"first");
    let mut buf = [0; 10];
    assert_eq!(store.get("a/b/one", 2, &mut buf).unwrap(), 3);
    assert_eq!(&buf[..3], b"rst");
    assert_eq!(store.size("a/b/one").unwrap(), Some(5));
    assert_eq!(store.size("a/b").unwrap(), None, "a folder is no object");
    assert_eq!(store.list("a").unwrap(), ["b"]);
    assert!(store.list("nothing").unwrap().is_empty());
    store.delete("a/b/one").unwrap();
    store.delete("a/b/one").unwrap();
    let gone = store.get("a/b/one", 0, &mut buf);
    assert!(
        matches!(gone, Err(StoreError::NotFound)),
        "an open file of it is not used"
    );
    // A folder that somebody took away is made again.
    std::fs::remove_dir(folder.0.join("a/b")).unwrap();
    assert_eq!(store.create("a/b/one", b"third").unwrap(), Created::New);
}

/// What is being uploaded has no name; published, it has exactly its length.
#[test]
fn an_upload_is_seen_whole_or_not_at_all() {
    let folder = Folder::new("upload");
    let store = folder.store();
    let bytes = blktide_sys::buffer::AlignedBuffer::padded(&noise(9000, Seed(1)));
    let upload = store.upload("p/pack").unwrap();
    upload.write_at(4096, &bytes[4096..]).unwrap();
    upload.write_at(0, &bytes[..4096]).unwrap();
    assert_eq!(store.size("p/pack").unwrap(), None);
    assert_eq!(std::fs::read_dir(folder.0.join("p")).unwrap().count(), 0);
    assert_eq!(upload.publish(9000).unwrap(), Created::New);
    assert_eq!(
        std::fs::read(folder.0.join("p/pack")).unwrap(),
        &bytes[..9000]
    );
    drop(store.upload("p/other").unwrap());
    assert_eq!(std::fs::read_dir(folder.0.join("p")).unwrap().count(), 1);
}

/// Entries of several threads, more than a pack holds: each lies where it was said to, and headers add up to the pack.
#[test]
fn packs_filled_by_several_threads() {
    let folder = Folder::new("packs");
    let random = TestRandom::new(Seed(2));
    let repository = Repository::init(folder.store(), &random, WallTime(1)).unwrap();
    let session = repository.claim(&request(1), &random).unwrap();
    let payload = |n: u64| noise(200_000 + usize::try_from(n).unwrap() * 13, Seed(n));
    let places = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for part in 0..4 {
            let (session, places, payload) = (&session, &places, &payload);
            scope.spawn(move || {
                for n in (0..200).filter(|n| n % 4 == part) {
                    let payload = payload(n);
                    let place = session.append(&NewEntry {
                        kind: EntryKind::Frame { blocks: 1 },
                        first_block: n * 64,
                        block_shift: 18,
                        codec: Codec::Raw,
                        raw_bytes: u32::try_from(payload.len()).unwrap(),
                        payload: &payload,
                    });
                    places.lock().unwrap().push((n, place.unwrap()));
                }
            });
        }
    });
    let packs = session.seal().unwrap();
    assert_eq!(packs.len(), 2, "40 MB in packs of 32 MiB");
    let mut entries = 0;
    for pack in &packs {
        let bytes = std::fs::read(folder.0.join(crate::name::pack(VOLUME, pack.pack))).unwrap();
        assert_eq!(bytes.len() as u64, pack.bytes);
        let mut headers = blake3::Hasher::new();
        headers.update(&bytes[..128]);
        let (mut at, mut count) = (128, 0);
        while at < bytes.len() {
            let offset = u32::try_from(at).unwrap();
            let (facts, _) = entry::decode(&bytes[at..], pack.pack, offset).unwrap();
            headers.update(&bytes[at..at + 48]);
            let end = at + 48 + usize::try_from(facts.stored_bytes).unwrap();
            let n = facts.first_block / 64;
            assert!(bytes[at + 48..end] == payload(n), "entry {n}");
            let places = places.lock().unwrap();
            let (_, place) = places.iter().find(|(m, _)| *m == n).unwrap();
            assert_eq!((place.pack, place.offset_bytes), (pack.pack, offset));
            (at, count) = (end, count + 1);
        }
        assert_eq!(Digest(*headers.finalize().as_bytes()), pack.digest);
        assert_eq!(count, pack.entries);
        entries += count;
    }
    assert_eq!(entries, 200);
}

/// An entry of three bytes.
fn entry() -> NewEntry<'static> {
    NewEntry {
        kind: EntryKind::Page { level: 0 },
        first_block: 0,
        block_shift: 12,
        codec: Codec::Raw,
        raw_bytes: 3,
        payload: b"abc",
    }
}

/// trap TG2: what a dead session wrote goes by itself, where nothing can have been built on it.
#[test]
fn packs_of_a_dead_session_go() {
    let folder = Folder::new("dead");
    let random = TestRandom::new(Seed(4));
    let repository = Repository::init(folder.store(), &random, WallTime(1)).unwrap();
    let dead = repository.claim(&request(1), &random).unwrap();
    dead.append(&entry()).unwrap();
    let pack = crate::name::pack(VOLUME, dead.seal().unwrap()[0].pack);
    assert!(repository.size(&pack).unwrap().is_some());
    let given_up = repository
        .abandon_dead(VOLUME, HostId([1; 16]), WallTime(6), &|_| false)
        .unwrap();
    assert_eq!(given_up, [1]);
    assert_eq!(repository.size(&pack).unwrap(), None);
}

/// P13: numbers are dense, a dead session's packs go with it, an image never does.
#[test]
fn claims_are_given_up_by_their_own_machine_only() {
    let folder = Folder::new("claims");
    let random = TestRandom::new(Seed(3));
    let repository = Repository::init(folder.store(), &random, WallTime(1)).unwrap();
    assert!(matches!(
        Repository::init(folder.store(), &random, WallTime(1)),
        Err(RepoError::Exists)
    ));
    let entry = entry();
    let dead = repository.claim(&request(1), &random).unwrap();
    dead.append(&entry).unwrap();
    let pack = dead.seal().unwrap()[0].pack;
    let other = repository.claim(&request(2), &random).unwrap();
    assert_eq!(other.neighbour(), Some(HostId([1; 16])));
    let image = repository.claim(&request(1), &random).unwrap();
    assert_eq!(
        (
            dead.facts().sequence,
            other.facts().sequence,
            image.facts().sequence
        ),
        (1, 2, 3)
    );
    image
        .commit(
            ImageId([1; 16]),
            b"a manifest",
            Digest([1; 32]),
            WallTime(1),
        )
        .unwrap();
    let given_up = repository
        .abandon_dead(VOLUME, HostId([1; 16]), WallTime(6), &|_| false)
        .unwrap();
    assert_eq!(given_up, [1]);
    let size = |pack| repository.size(&crate::name::pack(VOLUME, pack)).unwrap();
    assert!(size(pack).is_some(), "the image above may need it");
    let states: Vec<ClaimState> = repository
        .claims(VOLUME)
        .unwrap()
        .iter()
        .map(|c| c.state)
        .collect();
    assert_eq!(
        states,
        [
            ClaimState::Abandoned,
            ClaimState::Open,
            ClaimState::Committed(Digest([1; 32]))
        ]
    );
    // The dead one was not dead after all: it has lost.
    let late = dead.commit(ImageId([2; 16]), b"late", Digest([2; 32]), WallTime(1));
    assert!(matches!(late, Err(RepoError::Abandoned)), "{late:?}");
    assert!(matches!(
        repository.abandon(VOLUME, 3, WallTime(7)),
        Err(RepoError::ClaimInUse)
    ));
    repository.abandon(VOLUME, 2, WallTime(7)).unwrap();
    assert!(other.abandon(WallTime(8)).unwrap());
}
