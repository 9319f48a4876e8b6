//! Whatever a registry sends, a pull ends in an error or in the image that was promised.

use std::sync::{Arc, Mutex};

use kiln_cache::RecordType;
use kiln_worker::image::{Access, ResolveMode};
use kiln_worker::layer::{TarReader, settle, unpack};
use kiln_worker::registry::RegistryConfig;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use tar::EntryType;

use super::pulls::{Content, GZIP, ZSTD, amd64, named};
use super::support::{Member, Request, Scripted, archive, digest, listing, root, world};

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// Entries of every kind, for damage to hit; `name` makes the archive another one.
fn sample(name: &str) -> Vec<u8> {
    let pax: &[(&str, &[u8])] =
        &[("SCHILY.xattr.user.a", b"v"), ("mtime", b"-1.5"), ("GNU.sparse.major", b"1")];
    archive(&[
        Member::dir("d"),
        Member { pax, ..Member::file("d/f", &[1; 700]) },
        Member::link("l", EntryType::Symlink, "../../x"),
        Member::file("l/y", name.as_bytes()),
        Member::link("h", EntryType::Link, "d/f"),
        Member::file(".wh.q", b""),
    ])
}

/// Makes the checksums right of all blocks that look like headers: what is wrong with the rest is then seen.
fn correct(bytes: &mut [u8]) {
    for block in bytes.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

/// Unpacks somewhere; true if all of it stayed there.
fn stays_inside(bytes: &[u8]) -> bool {
    let world = tempfile::tempdir().expect("temp dir");
    let layer = world.path().join("layer");
    std::fs::create_dir(&layer).expect("dir");
    let _ = unpack(bytes, &layer).and_then(|unpacked| settle(&layer, unpacked, &[]));
    std::fs::read_dir(world.path()).expect("list").count() == 1
}

fn changes(most: usize) -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..most)
}

fn damage(bytes: &mut [u8], changes: &[(prop::sample::Index, u8)]) {
    for (at, value) in changes {
        bytes[at.index(bytes.len())] = *value;
    }
}

proptest! {
    #![proptest_config(config(200))]

    #[test]
    fn damaged_archives_never_escape_or_panic(changes in changes(12), corrected: bool) {
        let mut bytes = sample("z");
        damage(&mut bytes, &changes);
        if corrected {
            correct(&mut bytes);
        }
        prop_assert!(stays_inside(&bytes));
    }

    #[test]
    fn any_headers_are_entries_or_an_error(
        blocks in proptest::collection::vec((any::<u8>(), "[0-7]{0,11}", proptest::collection::vec(any::<u8>(), 0..512)), 0..8),
    ) {
        let mut bytes = Vec::new();
        for (kind, size, noise) in blocks {
            let mut block = [0; 512];
            block[..noise.len()].copy_from_slice(&noise);
            block[124..136].fill(0);
            block[124..124 + size.len()].copy_from_slice(size.as_bytes());
            block[156] = *[b'0', b'5', b'x', b'L', b'K', b'S', b'g', kind].get(usize::from(kind % 8)).unwrap_or(&kind);
            block[257..262].copy_from_slice(b"ustar");
            correct(&mut block);
            bytes.extend_from_slice(&block);
        }
        let mut reader = TarReader::new(&bytes[..]);
        // Bounded by the input: each entry takes a block of it.
        for _ in 0..bytes.len() / 512 + 1 {
            if !matches!(reader.next_entry(), Ok(Some(_))) {
                break;
            }
        }
        prop_assert!(stays_inside(&bytes));
    }
}

#[test]
fn a_damaged_layer_is_never_pulled_as_another() {
    if !root() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    let content = Arc::new(Mutex::new(Content::default()));
    let served = content.clone();
    let script = move |request: &Request| served.lock().expect("content").answer(request);
    let server = runtime.block_on(Scripted::start(script));
    let world = world(RegistryConfig::default());
    let mut count = 0;
    let mut pulled = 0;
    let mut case = |changes: Vec<(prop::sample::Index, u8)>, zstd: bool| {
        count += 1;
        let name = count.to_string();
        let archive = sample(&name);
        let (mut blob, media_type) = match zstd {
            true => (zstd::encode_all(&archive[..], 1).expect("zstd"), ZSTD),
            false => {
                let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                std::io::Write::write_all(&mut gzip, &archive).expect("gzip");
                (gzip.finish().expect("gzip"), GZIP)
            }
        };
        // The registry's digest is that of the damaged blob: only the diff id tells.
        damage(&mut blob, &changes);
        content.lock().expect("content").image(&name, "amd64", &[(blob, media_type, digest(&archive))]);
        let reference = named(&server.host, &format!("team/app:{name}"));
        let access = Access::anonymous();
        let (target, outcome) = runtime.block_on(async {
            let image = world.images.resolve(&reference, &amd64(), ResolveMode::Default, &access).await;
            let target =
                world.images.pull(&image.expect("resolve"), RecordType::Regular).await.expect("pull");
            let outcome = world.images.materialize(&target, &access).await;
            (target.expect("a layer"), outcome)
        });
        prop_assert_eq!(outcome.is_ok(), target.is_filled());
        if outcome.is_ok() {
            let good = tempfile::tempdir().expect("temp dir");
            let unpacked = unpack(&archive[..], good.path()).expect("unpack");
            settle(good.path(), unpacked, &[]).expect("settle");
            prop_assert_eq!(listing(&target.dir()), listing(good.path()));
            pulled += 1;
        }
        Ok(())
    };
    case(Vec::new(), false).expect("whole");
    let case = std::cell::RefCell::new(case);
    let mut runner = TestRunner::new(config(48));
    let ran = runner.run(&(changes(4), any::<bool>()), |(changes, zstd)| case.borrow_mut()(changes, zstd));
    ran.expect("no layer but the one that was promised");
    assert!(pulled > 0 && pulled < count, "{pulled} of {count}");
}
