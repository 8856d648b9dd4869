//! spegel's kernel programs, one module a program. No structure of the kernel's own is read, only the context that it promises to
//! programs of this kind, so that one object serves every kernel from 5.15 on, with or without BTF.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "see track::atomic_add")]

mod maps;
mod sockets;
mod track;

/// A program may do as it likes with its own types only if the compiler knows that nothing panics; what is left of that ends here.
#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Helpers that only programs with this licence may call are not called; it is the licence that kernels know best.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
