//! Which engine is chosen, and what a wedged one leads to. What needs a process of its own runs this test binary again.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Output};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use spegel::serve::{EngineKind, ServeError, ServeMetrics};

use super::*;

/// Set in the processes that tests start.
const CHILD: &str = "SPEGEL_TEST_CHILD";

/// io_uring_setup(2) and io_uring_enter(2), the same on every architecture that Linux gained since 2011, and on x86-64.
const SETUP: i64 = 425;
const ENTER: i64 = 426;

/// Runs one test of this binary, by its path, in a process of its own.
fn child(test: &str, case: &str) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("serve::engines::{test}"), "--nocapture", "--test-threads=1"]);
    command.env(CHILD, case).env("RUST_BACKTRACE", "0").output().unwrap()
}

fn case() -> Option<String> {
    std::env::var(CHILD).ok()
}

/// Makes the kernel refuse a system call to this process, as containerd's default profile does.
fn refuse(call: i64, errno: u32) {
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let rules = BTreeMap::from([(call, vec![])]);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno), arch).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    seccompiler::apply_filter_all_threads(&program).unwrap();
}

fn of(engine: EngineChoice) -> Options {
    Options { engine, runtimes: 2, ..Options::default() }
}

fn bind(options: Options) -> Result<Server, ServeError> {
    Server::bind(&[loopback()], options, Arc::new(|_: Request<Incoming>| async { Response::new(Body::empty()) }))
}

#[tokio::test]
async fn the_engine_is_told_with_its_reason() {
    let mut registry = spegel::metrics::Figures::default();
    let metrics = ServeMetrics::register(&mut registry);
    let server = bind(Options { metrics, ..of(EngineChoice::Tokio) }).unwrap();
    assert_eq!((server.engine().engine, server.engine().reason), (EngineKind::Tokio, "asked for"));
    let shown = spegel::metrics::encode(&registry, spegel::metrics::Format::OpenMetrics).unwrap();
    assert!(shown.contains("spegel_serve_engine_info{engine=\"tokio\",reason=\"asked for\"} 1\n"), "{shown}");
}

/// A filter stays for the rest of a process's life, so each case has its own.
#[test]
fn without_io_uring_everything_is_served_all_the_same() {
    let Some(case) = case() else {
        for case in ["setup EPERM", "setup ENOSYS", "enter EPERM"] {
            let output = child("without_io_uring_everything_is_served_all_the_same", case);
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && said.contains("1 passed"), "{case}: {said}");
        }
        return;
    };
    let (call, errno, reason) = match case.as_str() {
        "setup EPERM" => (SETUP, 1, "forbidden"),
        "setup ENOSYS" => (SETUP, 38, "not in this kernel"),
        // A ring can be made, and not used.
        _ => (ENTER, 1, "forbidden"),
    };
    refuse(call, errno);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let fixture = Fixture::with(of(EngineChoice::Auto));
        let chosen = fixture.server.engine();
        assert_eq!((chosen.engine, chosen.reason), (EngineKind::Tokio, reason));
        let bytes = noise(3 << 20);
        fixture.then(Body::file(file_of(&bytes), 0, bytes.len() as u64));
        same(&fixture.connect().await.fetch().await.1, &bytes);
        // Asked for by name it is not replaced in silence.
        let error = bind(of(EngineChoice::IoUring)).unwrap_err();
        assert!(matches!(error, ServeError::Engine(_)) && error.to_string().contains("refuses io_uring"), "{error}");
    });
}

/// A handler that blocks its thread, as no handler should.
fn wedged(engine: EngineChoice, watchdog: Option<Duration>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let handler = |_: Request<Incoming>| async {
            std::thread::sleep(Duration::from_secs(2));
            Response::new(text("late"))
        };
        let options = Options { engine, runtimes: 1, watchdog, ..Options::default() };
        let server = Server::bind(&[loopback()], options, Arc::new(handler)).unwrap();
        let mut client = Client { stream: TcpStream::connect(server.addrs()[0]).await.unwrap(), buf: Vec::new() };
        // Some turns go well before the one that does not.
        tokio::time::sleep(Duration::from_millis(600)).await;
        assert_eq!(client.fetch().await.1, b"late");
    });
}

#[test]
fn a_wedged_runtime_ends_the_process() {
    let engine = |name: &str| if name == "tokio" { EngineChoice::Tokio } else { EngineChoice::Auto };
    match case().as_deref() {
        Some(case) => {
            tracing_subscriber::fmt().with_ansi(false).init();
            let (name, watchdog) = case.split_once(' ').unwrap();
            wedged(engine(name), (watchdog == "on").then_some(Duration::from_millis(300)));
        }
        None => {
            for name in ["auto", "tokio"] {
                let output = child("a_wedged_runtime_ends_the_process", &format!("{name} on"));
                assert_eq!(output.status.signal(), Some(6), "{output:?}");
                let said = String::from_utf8_lossy(&output.stdout);
                assert!(said.contains("a data runtime made no turn for too long"), "{said}");
                assert!(said.contains("state S, waiting in "), "{said}");
                let output = child("a_wedged_runtime_ends_the_process", &format!("{name} off"));
                assert!(output.status.success(), "switched off it ends nothing: {output:?}");
            }
        }
    }
}
