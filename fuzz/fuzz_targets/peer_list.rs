#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| spegel::fuzz::peer_list(bytes));
