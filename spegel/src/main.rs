//! The `spegel` program: parse, prepare, trace, run, exit code.

use std::process::ExitCode;

use spegel::{app, cli};

fn main() -> ExitCode {
    let invocation = match cli::parse() {
        Ok(invocation) => invocation,
        Err(code) => return code,
    };
    let prepared = app::prepare(&invocation.command);
    let lines = app::trace(&invocation.log);
    let code = match prepared.and_then(|prepared| app::run(invocation.command, prepared)) {
        Ok(code) => code,
        Err(error) => {
            tracing::error!("{}", app::describe(&error));
            ExitCode::FAILURE
        }
    };
    app::write_out(lines);
    code
}
