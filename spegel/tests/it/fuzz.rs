//! The fuzz targets over the corpus that is kept of them, findings among it, and over what comes of it by chance.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

/// How many inputs are made of each corpus, where no time is given.
const INPUTS: u64 = 2_000;

/// How many seconds each target is to be run in earnest: `SPEGEL_FUZZ_SECONDS=180 cargo test -p spegel --test it fuzz:: -- --nocapture`.
const SECONDS: &str = "SPEGEL_FUZZ_SECONDS";

/// What has a meaning to one parser or another.
const WORDS: [&[u8]; 24] = [
    b"\r\n",
    b"\r\n\r\n",
    b": ",
    b", ",
    b"bytes=",
    b"bytes ",
    b"-",
    b"/",
    b"*",
    b"?ns=",
    b"sha256:",
    b"%2f",
    b"..",
    b"\0",
    b"\xff",
    b"18446744073709551615",
    b"-1",
    b"0",
    b"\"",
    b"{",
    b"]",
    b"[host.'",
    b"Content-Length: ",
    b"\x80\x80\x80\x01",
];

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus")
}

fn read(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(corpus().join(name)).unwrap().map(|entry| entry.unwrap().path());
    let mut entries: Vec<_> = entries.map(|path| (path.clone(), fs::read(path).unwrap())).collect();
    entries.sort();
    assert!(!entries.is_empty(), "{name} has no corpus");
    entries
}

#[test]
fn the_corpus_holds() {
    for (name, check) in spegel::fuzz::TARGETS {
        for (path, bytes) in read(name) {
            println!("{}", path.display());
            check(&bytes);
        }
    }
}

/// Every target is one that `cargo fuzz` knows.
#[test]
fn every_check_is_a_target() {
    let manifest = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/Cargo.toml")).unwrap();
    for (name, _) in spegel::fuzz::TARGETS {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
    }
}

/// Inputs that are like those of the corpus, always the same ones, or others for as long as is asked for.
#[test]
fn what_is_like_the_corpus_holds() {
    let seconds: Option<u64> = std::env::var(SECONDS).ok().map(|text| text.parse().unwrap());
    let seed = if seconds.is_some() { rand::rng().random() } else { 7 };
    std::thread::scope(|scope| {
        for (name, check) in spegel::fuzz::TARGETS {
            let run = move || {
                let count = try_target(name, check, seed, seconds.map(Duration::from_secs));
                println!("{name}: {count} inputs, seed {seed}");
            };
            // In earnest one after the other would take too long; else they are quick.
            match seconds {
                Some(_) => drop(scope.spawn(run)),
                None => run(),
            }
        }
    });
}

fn try_target(name: &str, check: fn(&[u8]), seed: u64, time: Option<Duration>) -> u64 {
    let mut pool: Vec<Vec<u8>> = read(name).into_iter().map(|(_, bytes)| bytes).collect();
    let (mut rng, start, mut count) = (StdRng::seed_from_u64(seed), Instant::now(), 0);
    loop {
        let is_over = match time {
            Some(time) => count % 256 == 0 && start.elapsed() >= time,
            None => count >= INPUTS,
        };
        if is_over {
            return count;
        }
        let input = mutate(&pool, &mut rng);
        count += 1;
        let caught = std::panic::catch_unwind(|| check(&input));
        assert!(caught.is_ok(), "{name}, seed {seed}, input {count}: {}", input.escape_ascii());
        // What is kept is mutated again, so that inputs get far from where they began.
        if pool.len() < 64 {
            pool.push(input);
        } else if rng.random_ratio(1, 16) {
            let at = rng.random_range(read_len(&pool)..pool.len());
            pool[at] = input;
        }
    }
}

/// The inputs of the corpus itself, at most half of the pool, stay in it.
fn read_len(pool: &[Vec<u8>]) -> usize {
    (pool.len() / 2).min(8)
}

fn mutate(pool: &[Vec<u8>], rng: &mut StdRng) -> Vec<u8> {
    let mut input = pool.choose(rng).unwrap().clone();
    for _ in 0..rng.random_range(1..=6) {
        let at = rng.random_range(0..=input.len());
        let end = (at + rng.random_range(0..=16)).min(input.len());
        match rng.random_range(0..8) {
            0 if at < input.len() => input[at] ^= 1 << rng.random_range(0..8),
            1 if at < input.len() => input[at] = rng.random(),
            2 => drop(input.drain(at..end)),
            3 => {
                let part = input[at..end].to_vec();
                input.splice(at..at, part);
            }
            4 | 5 => {
                let word: &[u8] = WORDS.choose(rng).unwrap();
                input.splice(at..at, word.iter().copied());
            }
            6 => {
                let other = pool.choose(rng).unwrap();
                let from = rng.random_range(0..=other.len());
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            _ => input.truncate(at),
        }
        input.truncate(64 << 10);
    }
    input
}
