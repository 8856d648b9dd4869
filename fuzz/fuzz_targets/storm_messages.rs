#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| spegel::fuzz::storm_messages(bytes));
