//! Random packets against the receiver of a transfer: it ends, and nothing outside its directory changes. Runs for a
//! moment; `KILN_FUZZ_SECONDS` makes it longer, and `KILN_FUZZ_SEED` begins where a failure was.

mod common;

use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use common::{listing, write};
use futures::StreamExt;
use kiln_proto::fsutil::packet::PacketType;
use kiln_proto::fsutil::{Packet, Stat};
use kiln_proto::gomode;
use kiln_session::fsutil::{self, ReceiveMode, ReceiveOptions};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use tempfile::tempdir;
use tokio::sync::mpsc;

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

const PATHS: &[&[u8]] = &[
    b"a",
    b"a/b",
    b"a/b/c",
    b"b",
    b"c",
    b"c/d",
    b"escape",
    b"escape/x",
    b"..",
    b"../outside/x",
    b"/etc",
    b"a/../b",
    b"",
    b".",
    b"a//b",
    b"a\0b",
    b"\xc3\xa9",
    b"\xe9",
    b"a/\xff",
    b"\xff/../../outside/x",
    b"z/../../outside/y",
    b"a/b/../../../outside/w",
];
const TARGETS: &[&[u8]] = &[
    b"a",
    b"../outside",
    b"../outside/kept",
    b"/etc/passwd",
    b"",
    b"a/b",
    b"escape/kept",
    b"\0",
    b"b",
    b"\xe9",
    b"\xff/../../outside",
];

fn stat(random: &mut StdRng) -> Stat {
    let kinds =
        [0, 0, 0, gomode::DIR, gomode::DIR, gomode::SYMLINK, gomode::NAMED_PIPE, gomode::IRREGULAR, u32::MAX];
    let mut stat = Stat {
        path: (*PATHS.choose(random).expect("some")).to_owned(),
        mode: kinds.choose(random).expect("some") | random.random_range(0..0o10000),
        uid: random.random_range(0..3),
        gid: random.random_range(0..3),
        size: *[0, 1, 5, -1, i64::MAX].choose(random).expect("some"),
        mod_time: *[0, 1, -1, i64::MIN, i64::MAX].choose(random).expect("some"),
        ..Stat::default()
    };
    if random.random_bool(0.3) {
        stat.linkname = (*TARGETS.choose(random).expect("some")).to_owned();
    }
    if random.random_bool(0.1) {
        let name = *["user.a", "trusted.overlay.opaque", "security.capability", "x", ""]
            .choose(random)
            .expect("some");
        stat.xattrs.insert(name.to_owned(), vec![random.random(); 5]);
    }
    stat
}

fn packets(random: &mut StdRng) -> Vec<Packet> {
    let mut stats: Vec<Stat> = (0..random.random_range(0..8)).map(|_| stat(random)).collect();
    // Most of what is out of order is refused at its second entry.
    if random.random_bool(0.8) {
        let parts =
            |stat: &Stat| stat.path.split(|byte| *byte == b'/').map(<[u8]>::to_vec).collect::<Vec<_>>();
        stats.sort_by_cached_key(parts);
        stats.dedup_by(|one, two| one.path == two.path);
    }
    let mut all: Vec<Packet> =
        stats.into_iter().map(|stat| Packet { stat: Some(stat), ..Packet::default() }).collect();
    if random.random_bool(0.8) {
        all.push(Packet::default());
    }
    for _ in 0..random.random_range(0..12) {
        let kinds =
            [PacketType::PacketData, PacketType::PacketData, PacketType::PacketFin, PacketType::PacketReq];
        let kind = match random.random_range(0..30) {
            0 => PacketType::PacketErr,
            1 => PacketType::PacketStat,
            _ => *kinds.choose(random).expect("some"),
        };
        let length = *[0, 1, 5, 5000].choose(random).expect("some");
        let id = *[0, 0, 1, 2, 3, u32::MAX].choose(random).expect("some");
        let packet = Packet { r#type: kind.into(), id, data: vec![b'x'; length].into(), stat: None };
        let at = random.random_range(all.len() / 2..=all.len());
        all.insert(at, packet);
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn packets_change_nothing_outside() {
    let until = Instant::now() + Duration::from_secs(number("KILN_FUZZ_SECONDS", 1));
    let mut seed = number("KILN_FUZZ_SEED", 0);
    while Instant::now() < until {
        seed += 1;
        let mut random = StdRng::seed_from_u64(seed);
        let packets = packets(&mut random);
        let dir = tempdir().expect("directory");
        let (to, outside) = (dir.path().join("to"), dir.path().join("outside"));
        write(&outside, "kept", "kept");
        write(&to, "c/old", "old");
        symlink("../outside", to.join("escape")).expect("link");
        let before = listing(&outside);
        let (requests, _replies) = mpsc::unbounded_channel();
        let mode = if random.random_bool(0.5) { ReceiveMode::Merge } else { ReceiveMode::default() };
        let options = ReceiveOptions { mode, ..ReceiveOptions::default() };
        let shown = format!("KILN_FUZZ_SEED={}: {packets:?}", seed - 1);
        let incoming = futures::stream::iter(packets.into_iter().map(Ok)).boxed();
        let ended =
            tokio::time::timeout(Duration::from_secs(20), fsutil::receive(&to, options, incoming, requests));
        // What it says is not the matter here.
        let _ = ended.await.unwrap_or_else(|_| panic!("it hangs: {shown}"));
        assert_eq!(listing(&outside), before, "{shown}");
        let names: Vec<_> = std::fs::read_dir(dir.path()).expect("read").flatten().collect();
        assert_eq!(names.len(), 2, "{shown}: {names:?}");
    }
}
