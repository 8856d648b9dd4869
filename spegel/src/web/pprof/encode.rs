//! Samples as the pprof tool reads them: the message `Profile` of
//! [profile.proto](https://github.com/google/pprof/blob/main/proto/profile.proto), compressed with gzip.
//!
//! Addresses and mappings are told as well as names: who strips a release takes them away, and the tool finds them in one that was not stripped.

use std::collections::HashMap;
use std::ffi::c_void;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use flate2::Compression;
use flate2::write::GzEncoder;
use pprof::UnresolvedReport;
use procfs::process::{MMPermissions, MMapPath, Process};
use prost::Message;

/// The profiler's own signal handler: it, what it calls, and the kernel's trampoline behind it are at the top of each stack.
const HANDLER: &str = "perf_signal_handler";

#[derive(Clone, PartialEq, Message)]
struct Profile {
    #[prost(message, repeated, tag = "1")]
    sample_type: Vec<ValueType>,
    #[prost(message, repeated, tag = "2")]
    sample: Vec<Sample>,
    #[prost(message, repeated, tag = "3")]
    mapping: Vec<Mapping>,
    #[prost(message, repeated, tag = "4")]
    location: Vec<Location>,
    #[prost(message, repeated, tag = "5")]
    function: Vec<Function>,
    #[prost(string, repeated, tag = "6")]
    string_table: Vec<String>,
    #[prost(int64, tag = "9")]
    time_nanos: i64,
    #[prost(int64, tag = "10")]
    duration_nanos: i64,
    #[prost(message, optional, tag = "11")]
    period_type: Option<ValueType>,
    #[prost(int64, tag = "12")]
    period: i64,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct ValueType {
    #[prost(int64, tag = "1")]
    kind: i64,
    #[prost(int64, tag = "2")]
    unit: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Sample {
    /// The innermost first.
    #[prost(uint64, repeated, tag = "1")]
    location_id: Vec<u64>,
    #[prost(int64, repeated, tag = "2")]
    value: Vec<i64>,
    #[prost(message, repeated, tag = "3")]
    label: Vec<Label>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Label {
    #[prost(int64, tag = "1")]
    key: i64,
    #[prost(int64, tag = "2")]
    text: i64,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Mapping {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(uint64, tag = "2")]
    memory_start: u64,
    #[prost(uint64, tag = "3")]
    memory_limit: u64,
    #[prost(uint64, tag = "4")]
    file_offset: u64,
    #[prost(int64, tag = "5")]
    filename: i64,
    #[prost(bool, tag = "7")]
    has_functions: bool,
    /// With this and the next two the tool looks for nothing more by itself.
    #[prost(bool, tag = "8")]
    has_filenames: bool,
    #[prost(bool, tag = "9")]
    has_line_numbers: bool,
    #[prost(bool, tag = "10")]
    has_inline_frames: bool,
}

#[derive(Clone, PartialEq, Message)]
struct Location {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(uint64, tag = "2")]
    mapping_id: u64,
    #[prost(uint64, tag = "3")]
    address: u64,
    /// What was inlined first.
    #[prost(message, repeated, tag = "4")]
    line: Vec<Line>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Line {
    #[prost(uint64, tag = "1")]
    function_id: u64,
    #[prost(int64, tag = "2")]
    line: i64,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Function {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(int64, tag = "2")]
    name: i64,
    #[prost(int64, tag = "3")]
    system_name: i64,
    #[prost(int64, tag = "4")]
    filename: i64,
}

/// A stack, the innermost address first, the thread's name, and how often it was met.
struct Stack {
    addresses: Vec<usize>,
    thread: String,
    count: i64,
}

/// A profile in the making. Ids begin at 1.
#[derive(Default)]
struct Writer {
    profile: Profile,
    texts: HashMap<String, i64>,
    functions: HashMap<(String, Option<PathBuf>), u64>,
    locations: HashMap<usize, u64>,
}

/// What was sampled, ready for the tool.
///
/// # Errors
/// Never on memory alone; whatever the compressor says.
pub(super) fn encode(report: UnresolvedReport) -> std::io::Result<Vec<u8>> {
    let timing = report.timing.clone();
    let stacks = report.data.into_iter().map(|(frames, count)| Stack {
        // The unwinder ends a thread's stack with a frame at 0.
        addresses: frames.frames.iter().map(|frame| frame.ip() as usize).filter(|address| *address != 0).collect(),
        thread: String::from_utf8_lossy(&frames.thread_name[..frames.thread_name_length]).into_owned(),
        count: i64::try_from(count).unwrap_or_default(),
    });
    let stacks: Vec<Stack> = stacks.collect();
    let nanos = |time: std::time::Duration| i64::try_from(time.as_nanos()).unwrap_or(i64::MAX);
    let period = 1_000_000_000 / i64::from(timing.frequency.max(1));

    let mut writer = Writer::default();
    // The first text is the empty one.
    writer.text("");
    let kinds = [("samples", "count"), ("cpu", "nanoseconds")];
    let kinds = kinds.map(|(kind, unit)| ValueType { kind: writer.text(kind), unit: writer.text(unit) });
    writer.profile.sample_type = kinds.to_vec();
    (writer.profile.period_type, writer.profile.period) = (Some(kinds[1]), period);
    writer.profile.time_nanos = nanos(timing.start_time.duration_since(UNIX_EPOCH).unwrap_or_default());
    writer.profile.duration_nanos = nanos(timing.duration);
    writer.map();
    let thread = writer.text("thread");
    let above = overhead(&stacks);
    for stack in &stacks {
        let location_id = stack.addresses.iter().skip(above).map(|address| writer.location(*address)).collect();
        let label = vec![Label { key: thread, text: writer.text(&stack.thread) }];
        writer.profile.sample.push(Sample { location_id, value: vec![stack.count, stack.count * period], label });
    }
    let mut compressed = GzEncoder::new(Vec::new(), Compression::default());
    compressed.write_all(&writer.profile.encode_to_vec())?;
    compressed.finish()
}

/// How many of the innermost frames are the profiler's own: up to the trampoline behind its handler. Where that has no name, what all stacks
/// have in common.
fn overhead(stacks: &[Stack]) -> usize {
    let Some(any) = stacks.iter().max_by_key(|stack| stack.addresses.len()) else { return 0 };
    let handler = any.addresses.iter().position(|address| names(*address).iter().any(|name| name.0 == HANDLER));
    if let Some(handler) = handler {
        return handler + 2;
    }
    if stacks.len() < 2 {
        return 0;
    }
    let is_common = |depth: &usize| stacks.iter().all(|one| one.addresses.get(*depth) == any.addresses.get(*depth));
    (0..any.addresses.len()).take_while(is_common).count()
}

/// The functions at an address, what was inlined first, with file and line as far as they are known.
fn names(address: usize) -> Vec<(String, Option<PathBuf>, Option<u32>)> {
    let mut found = Vec::new();
    backtrace::resolve(address as *mut c_void, |symbol| {
        // Without the hash at its end.
        let name = symbol.name().map(|name| format!("{name:#}"));
        // A name that is there and empty is as good as none.
        let name = name.filter(|name| !name.is_empty());
        found.extend(name.map(|name| (name, symbol.filename().map(PathBuf::from), symbol.lineno())));
    });
    found
}

impl Writer {
    fn text(&mut self, text: &str) -> i64 {
        if let Some(known) = self.texts.get(text) {
            return *known;
        }
        let number = self.profile.string_table.len() as i64;
        self.profile.string_table.push(text.to_owned());
        self.texts.insert(text.to_owned(), number);
        number
    }

    /// The files whose code is in memory. The tool takes the first one for the program.
    fn map(&mut self) {
        let maps = Process::myself().and_then(|process| process.maps()).map(|maps| maps.0).unwrap_or_default();
        for map in maps {
            let MMapPath::Path(path) = map.pathname else { continue };
            if !map.perms.contains(MMPermissions::EXECUTE) {
                continue;
            }
            let id = self.profile.mapping.len() as u64 + 1;
            let (memory_start, memory_limit) = map.address;
            let filename = self.text(&path.to_string_lossy());
            let file_offset = map.offset;
            let mapping = Mapping { id, memory_start, memory_limit, file_offset, filename, ..Mapping::default() };
            self.profile.mapping.push(mapping);
        }
    }

    fn location(&mut self, address: usize) -> u64 {
        if let Some(known) = self.locations.get(&address) {
            return *known;
        }
        let names = names(address);
        let is_exact = names.iter().any(|(_, file, line)| file.is_some() && line.is_some());
        let line: Vec<Line> = names.into_iter().map(|name| self.line(name)).collect();
        let at = address as u64;
        let mapping = self.profile.mapping.iter_mut().find(|map| (map.memory_start..map.memory_limit).contains(&at));
        let mapping_id = mapping.map_or(0, |mapping| {
            mapping.has_functions |= !line.is_empty();
            mapping.has_filenames |= is_exact;
            mapping.has_line_numbers |= is_exact;
            mapping.has_inline_frames |= is_exact;
            mapping.id
        });
        let id = self.profile.location.len() as u64 + 1;
        self.profile.location.push(Location { id, mapping_id, address: at, line });
        self.locations.insert(address, id);
        id
    }

    fn line(&mut self, (name, file, line): (String, Option<PathBuf>, Option<u32>)) -> Line {
        let line = i64::from(line.unwrap_or_default());
        let function = (name, file);
        if let Some(known) = self.functions.get(&function) {
            return Line { function_id: *known, line };
        }
        let name = self.text(&function.0);
        let filename = self.text(&function.1.as_ref().map_or_else(String::new, |path| path.display().to_string()));
        let id = self.profile.function.len() as u64 + 1;
        self.profile.function.push(Function { id, name, system_name: name, filename });
        self.functions.insert(function, id);
        Line { function_id: id, line }
    }
}
