//! The `spegel` program: parse, trace, run, exit code.

use std::process::ExitCode;

use spegel::{app, cli};

fn main() -> ExitCode {
    let invocation = match cli::parse() {
        Ok(invocation) => invocation,
        Err(code) => return code,
    };
    let _lines = app::trace(&invocation.log);
    match app::run(invocation.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", app::describe(&error));
            ExitCode::FAILURE
        }
    }
}
