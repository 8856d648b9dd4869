//! Which room may use which: the table in `spegel/src/lib.rs`, read as it stands there.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

use super::code::is_word;

/// The table.
#[derive(Debug)]
pub(super) struct Levels {
    levels: BTreeMap<String, u32>,
    /// Room, other room of its level, and what it may take from it.
    exceptions: Vec<(String, String, String)>,
    top: u32,
}

/// One use of another room.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Edge {
    pub(super) room: String,
    /// The first name after the room's, if one is given.
    pub(super) item: Option<String>,
}

impl Levels {
    /// Reads rows such as ``//! | 2 | [`store`], [`router`] | below; `router` takes `store`'s [`store::Change`] only |``.
    pub(super) fn parse(lib: &str) -> Result<Self> {
        let mut levels = BTreeMap::new();
        let mut exceptions = Vec::new();
        for line in lib.lines() {
            let Some(row) = line.trim().strip_prefix("//! |") else { continue };
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            let [level, rooms, rule, ..] = cells[..] else { continue };
            let Ok(level) = level.parse::<u32>() else { continue };
            levels.extend(names(rooms).map(|room| (room.to_owned(), level)));
            for sentence in rule.split(';').filter(|sentence| sentence.contains(" takes ")) {
                let found: Vec<&str> = names(sentence).collect();
                if let [room, other, path] = found[..]
                    && let Some((_, item)) = path.split_once("::")
                {
                    exceptions.push((room.to_owned(), other.to_owned(), item.to_owned()));
                }
            }
        }
        ensure!(!levels.is_empty(), "spegel/src/lib.rs has no table of levels");
        let top = levels.values().copied().max().unwrap_or(0);
        Ok(Self { levels, exceptions, top })
    }

    /// Whether a room may use what the edge names.
    pub(super) fn check(&self, room: &str, edge: &Edge) -> Result<(), String> {
        let missing = |name: &str| format!("the room {name} is not in the table of spegel/src/lib.rs");
        let from = *self.levels.get(room).ok_or_else(|| missing(room))?;
        if edge.room == room {
            return Ok(());
        }
        let to = *self.levels.get(&edge.room).ok_or_else(|| missing(&edge.room))?;
        let excepted = || {
            let (other, item) = (edge.room.as_str(), edge.item.as_deref());
            self.exceptions.iter().any(|(r, o, i)| r == room && o == other && Some(i.as_str()) == item)
        };
        if to < from || from == self.top || excepted() {
            return Ok(());
        }
        Err(format!("{room} (level {from}) uses {} (level {to})", edge.room))
    }
}

/// The room that a file of the `spegel` crate belongs to; `lib.rs` and `main.rs` belong to none.
pub(super) fn room_of(path: &str) -> Option<&str> {
    let room = path.strip_prefix("spegel/src/")?.split('/').next()?;
    let room = room.strip_suffix(".rs").unwrap_or(room);
    (!["lib", "main"].contains(&room)).then_some(room)
}

/// Every `crate::` path in code without comments and literals, with its line.
pub(super) fn imports(code: &str) -> Vec<(usize, Edge)> {
    let mut found = Vec::new();
    for (at, word) in code.match_indices("crate::") {
        // `$crate::` and `my_crate::` are others.
        if code[..at].ends_with(|c: char| is_word(c) || c == '$') {
            continue;
        }
        let line = code[..at].lines().count().max(1);
        let line = if code[..at].ends_with('\n') { line + 1 } else { line };
        for path in branches(&code[at + word.len()..]) {
            let mut rooms = branches_of_path(&path);
            found.extend(rooms.drain(..).map(|edge| (line, edge)));
        }
    }
    found
}

/// `{a::b, c}` as `a::b` and `c`; anything else as itself.
fn branches(text: &str) -> Vec<String> {
    let text = text.trim_start();
    let Some(group) = text.strip_prefix('{') else {
        let end = path_end(text);
        return vec![text[..end].to_owned()];
    };
    let mut depth = 1;
    let mut branches = vec![String::new()];
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => {
                branches.push(String::new());
                continue;
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
        if let Some(branch) = branches.last_mut() {
            branch.push(c);
        }
    }
    branches.into_iter().map(|branch| branch.trim().to_owned()).filter(|branch| !branch.is_empty()).collect()
}

/// Where a path ends that may end in a group.
fn path_end(text: &str) -> usize {
    let plain = text.find(|c: char| !is_word(c) && c != ':').unwrap_or(text.len());
    if text[plain..].starts_with('{') && text[..plain].ends_with("::") {
        let mut depth = 0;
        for (at, c) in text[plain..].char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return plain + at + 1;
            }
        }
    }
    plain
}

/// The edges of `room`, `room::item…` or `room::{items}`.
fn branches_of_path(path: &str) -> Vec<Edge> {
    let name = |text: &str| -> String { text.trim_start().chars().take_while(|c| is_word(*c)).collect() };
    let room = name(path);
    match path.split_once("::") {
        Some((_, rest)) => {
            let items = branches(rest);
            items.iter().map(|item| Edge { room: room.clone(), item: Some(name(item)) }).collect()
        }
        None => vec![Edge { room, item: None }],
    }
}

/// The names between backticks.
fn names(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_found_wherever_they_stand() {
        let code = "use crate::oci;\nuse crate::store::{Blob, Store as S};\nfn f() -> crate::mirror::Found { $crate::x::y() }\n";
        let edges: Vec<String> = imports(code)
            .into_iter()
            .map(|(line, edge)| format!("{line} {} {}", edge.room, edge.item.unwrap_or_default()))
            .collect();
        assert_eq!(edges, ["1 oci ", "2 store Blob", "2 store Store", "3 mirror Found"]);
    }
}
