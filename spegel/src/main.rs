//! The `spegel` program: parse, trace, run, exit code.

use std::process::ExitCode;

use spegel::{app, cli};

fn main() -> ExitCode {
    let invocation = match cli::parse() {
        Ok(invocation) => invocation,
        Err(code) => return code,
    };
    let lines = app::trace(&invocation.log);
    let code = match app::run(invocation.command) {
        Ok(code) => code,
        Err(error) => {
            tracing::error!("{}", app::describe(&error));
            ExitCode::FAILURE
        }
    };
    app::write_out(lines);
    code
}
