//! A file with variables, as systemd reads it for a unit: what stands in quotes is one value, and nothing means anything to a shell.

use std::ffi::OsString;
use std::fs;
use std::iter::Peekable;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::str::Chars;

use clap::CommandFactory as _;
use clap::error::ErrorKind;

/// The flag that names the file, and its variable.
const FLAG: &str = "--env-file";
const VARIABLE: &str = "ENV_FILE";

/// Starts this program anew in the place of this process, with the file's variables beside those that are set already, which count more.
/// What is returned says why that was not possible.
pub(super) fn again(file: &Path, arguments: &[OsString]) -> clap::Error {
    let failed = |why: String| super::args::Cli::command().error(ErrorKind::Io, format!("{}: {why}\n", file.display()));
    let text = match fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) => return failed(error.to_string()),
    };
    let mut command = match std::env::current_exe() {
        Ok(program) => Command::new(program),
        Err(error) => return failed(error.to_string()),
    };
    command.args(without_flag(arguments.iter().skip(1))).env_remove(VARIABLE);
    command.envs(read(&text).into_iter().filter(|(name, _)| name != VARIABLE && is_unset(name)));
    failed(command.exec().to_string())
}

/// As for all flags, a variable that is set to nothing is not set, but for the one that means something by it.
fn is_unset(name: &str) -> bool {
    std::env::var_os(name).is_none_or(|value| value.is_empty() && name != "CONTAINERD_CONTENT_PATH")
}

fn without_flag<'a>(arguments: impl Iterator<Item = &'a OsString>) -> Vec<&'a OsString> {
    let mut is_value = false;
    let stays = |argument: &&OsString| {
        let was_value = is_value;
        is_value = !was_value && *argument == FLAG;
        let text = argument.to_string_lossy();
        !was_value && !is_value && !text.strip_prefix(FLAG).is_some_and(|rest| rest.starts_with('='))
    };
    arguments.filter(stays).collect()
}

/// The variables of a text, in their order.
fn read(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    let mut rest = text.chars().peekable();
    while let Some(&first) = rest.peek() {
        if first.is_whitespace() {
            rest.next();
        } else if first == '#' || first == ';' {
            rest.by_ref().find(|c| *c == '\n');
        } else {
            let mut name = String::new();
            while let Some(c) = rest.next_if(|c| *c != '=' && *c != '\n') {
                name.push(c);
            }
            if rest.next_if_eq(&'=').is_some() {
                let name = name.trim().to_owned();
                let value = value(&mut rest);
                if is_name(&name) {
                    found.push((name, value));
                }
            }
        }
    }
    found
}

fn is_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// The rest of a line, which goes on where a backslash ends it.
fn value(rest: &mut Peekable<Chars<'_>>) -> String {
    let mut value = String::new();
    // How much of it stays whatever spaces follow.
    let mut kept = 0;
    while rest.next_if(|c| *c != '\n' && c.is_whitespace()).is_some() {}
    while let Some(quote) = rest.next_if(|c| *c == '"' || *c == '\'') {
        while let Some(c) = rest.next_if(|c| *c != quote) {
            match (c, rest.peek()) {
                ('\\', Some('\n')) if quote == '"' => drop(rest.next()),
                ('\\', Some('"' | '\\' | '`' | '$')) if quote == '"' => value.extend(rest.next()),
                _ => value.push(c),
            }
        }
        rest.next();
        kept = value.len();
        while rest.next_if(|c| *c != '\n' && c.is_whitespace()).is_some() {}
    }
    while let Some(c) = rest.next() {
        match c {
            '\n' => break,
            '\\' => {
                value.extend(rest.next().filter(|c| *c != '\n'));
                kept = value.len();
            }
            c => value.push(c),
        }
    }
    let end = value[kept..].trim_end().len();
    value.truncate(kept + end);
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_read_as_systemd_reads_them() {
        let text = "# A=1\n; A=2\n\n A=a b  \nB=\"c d\" \nC='e \"f\" $g'\nD=h|(i)$j;k # no comment\nE=\nF = \"l\\\"m\\n\"\n\
                    G=n\\\n  o\n1I=r\nno variable\nJ=^s\\.t\nK=\"u\\\nv\"'w'\nL=last";
        let expected = [
            ("A", "a b"),
            ("B", "c d"),
            ("C", "e \"f\" $g"),
            ("D", "h|(i)$j;k # no comment"),
            ("E", ""),
            ("F", "l\"m\\n"),
            ("G", "n  o"),
            ("J", "^s.t"),
            ("K", "uvw"),
            ("L", "last"),
        ];
        assert_eq!(read(text), expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn the_flag_is_taken_away_with_its_value() {
        let of = |arguments: &[&str]| {
            let arguments: Vec<OsString> = arguments.iter().map(Into::into).collect();
            without_flag(arguments.iter()).into_iter().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>()
        };
        assert_eq!(of(&["doctor", "--env-file", "a", "--json"]), ["doctor", "--json"]);
        assert_eq!(of(&["doctor", "--json", "--env-file=a"]), ["doctor", "--json"]);
    }
}
