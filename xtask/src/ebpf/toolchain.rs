//! The compiler of the kernel programs, in a folder of its own beside other caches: Debian's packages of a newer Rust with its sources and of
//! LLVM, unpacked and not installed, and a linker that is built with them. Nothing of the machine is changed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use spegel_benches::daemon::{find_program, output};

/// The packages, with what they need that not every machine has.
const PACKAGES: [&str; 17] = [
    "rustc-web",
    "rust-web-src",
    "libstd-rust-web-dev",
    "libstd-rust-web-1.96",
    "llvm-22",
    "llvm-22-dev",
    "llvm-22-linker-tools",
    "llvm-22-tools",
    "libllvm22",
    "libclang-cpp22",
    "libz3-4",
    "libz3-dev",
    "libpfm4",
    "libffi-dev",
    "libxml2-dev",
    "libncurses-dev",
    "libncurses6",
];

/// The linker that makes one object of LLVM's bitcode.
const LINKER: &str = "0.13.0";

/// A compiler that is there.
#[derive(Debug)]
pub(crate) struct Toolchain {
    folder: PathBuf,
}

// === impl Toolchain ===

impl Toolchain {
    /// Finds it, or puts it there, which takes some 230 MB of packages and two minutes.
    ///
    /// # Errors
    /// Not Debian's packages, or what one of the programs says.
    pub(super) fn get() -> Result<Self> {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
        let folder = cache.context("neither XDG_CACHE_HOME nor HOME is set")?.join("spegel/ebpf-toolchain");
        let toolchain = Self { folder };
        if !toolchain.compiler().exists() {
            toolchain.unpack()?;
        }
        if !toolchain.linker().exists() {
            toolchain.build_linker()?;
        }
        Ok(toolchain)
    }

    /// Which programs these are.
    pub(super) fn versions(&self) -> Result<String> {
        let mut command = Command::new(self.compiler());
        command.arg("--version").env("LD_LIBRARY_PATH", self.libraries());
        let compiler = output(&mut command)?;
        Ok(format!("{}, bpf-linker {LINKER}", compiler.trim()))
    }

    /// Where it builds.
    pub(super) fn target(&self) -> PathBuf {
        self.folder.join("target")
    }

    /// Makes cargo use it.
    pub(super) fn enter(&self, command: &mut Command) {
        let mut path = self.folder.join("cargo/bin").into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        command
            .env("RUSTC", self.compiler())
            // The compiler is a stable one; building the core library for another target is not.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("PATH", path)
            .env("LD_LIBRARY_PATH", self.libraries())
            .env("CARGO_TARGET_DIR", self.target())
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env_remove("RUSTC_WRAPPER")
            .env_remove("RUSTUP_TOOLCHAIN");
    }

    fn compiler(&self) -> PathBuf {
        self.folder.join("root/usr/bin/rustc")
    }

    fn linker(&self) -> PathBuf {
        self.folder.join("cargo/bin/bpf-linker")
    }

    fn libraries(&self) -> String {
        let root = self.folder.join("root/usr/lib");
        format!("{}:{}", root.join("x86_64-linux-gnu").display(), root.join("llvm-22/lib").display())
    }

    fn unpack(&self) -> Result<()> {
        ensure!(cfg!(target_arch = "x86_64"), "the kernel programs' compiler is set up on x86-64 only");
        for program in ["apt-get", "dpkg-deb"] {
            ensure!(
                find_program(program).is_some(),
                "this machine has no {program}, whose packages the compiler is of"
            );
        }
        println!("fetching the kernel programs' compiler (230 MB), once");
        let (packages, part) = (self.folder.join("packages"), self.folder.join("root.part"));
        let _ = fs::remove_dir_all(&part);
        fs::create_dir_all(&packages)?;
        let fetch = || output(Command::new("apt-get").current_dir(&packages).args(["-qq", "download"]).args(PACKAGES));
        if fetch().is_err() {
            // The lists may be old, or not there.
            output(Command::new("apt-get").args(["-qq", "update"]))?;
            fetch()?;
        }
        for entry in fs::read_dir(&packages)? {
            output(Command::new("dpkg-deb").arg("--extract").arg(entry?.path()).arg(&part))?;
        }
        fs::remove_dir_all(&packages)?;
        prune(&part.join("usr/src"))?;
        let whole = self.folder.join("root");
        let _ = fs::remove_dir_all(&whole);
        fs::rename(&part, &whole)?;
        Ok(())
    }

    fn build_linker(&self) -> Result<()> {
        println!("building bpf-linker {LINKER}, once");
        let mut command = Command::new(env!("CARGO"));
        command.args(["install", "--quiet", "bpf-linker", "--version", LINKER, "--locked", "--no-default-features"]);
        command.args(["--features", "llvm-22", "--root"]).arg(self.folder.join("cargo"));
        command.arg("--target-dir").arg(self.folder.join("build"));
        command.env("LLVM_PREFIX", self.folder.join("root/usr/lib/llvm-22"));
        command.env("LD_LIBRARY_PATH", self.libraries()).env("LIBRARY_PATH", self.libraries());
        ensure!(command.status().context("run cargo")?.success(), "bpf-linker does not build");
        let _ = fs::remove_dir_all(self.folder.join("build"));
        Ok(())
    }
}

/// Of the compiler's sources only the libraries are needed; all of it is more than a GB.
fn prune(sources: &Path) -> Result<()> {
    for entry in fs::read_dir(sources)? {
        let version = entry?.path();
        for part in ["src", "compiler", "tests"] {
            let part = version.join(part);
            if part.is_dir() {
                fs::remove_dir_all(part)?;
            }
        }
    }
    Ok(())
}
