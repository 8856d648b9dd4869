//! Parts of content: the `Range` header of a request and the `Content-Range` header of an answer
//! ([RFC 9110, section 14](https://www.rfc-editor.org/rfc/rfc9110#section-14)).

use std::fmt;
use std::str::FromStr;

/// One range of bytes that a client asked for, before the content's size is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeSpec {
    /// `bytes=first-` or `bytes=first-last`: offsets in bytes, the last one inclusive.
    From {
        /// Offset of the first byte.
        first: u64,
        /// Offset of the last byte; none means up to the end.
        last: Option<u64>,
    },
    /// `bytes=-length`: the last bytes.
    Suffix(u64),
}

/// Which bytes of some content to answer with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeOutcome {
    /// All of it, with status 200: no range was asked for, or none that we know.
    Whole,
    /// A part of it, never empty, with status 206.
    Part {
        /// Offset of the first byte.
        start: u64,
        /// Offset behind the last byte.
        end_exclusive: u64,
    },
    /// The range lies beyond the content: status 416.
    Unsatisfiable,
}

/// What a `Content-Range` header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentRange {
    /// `bytes start-last/total`, the bytes that a 206 carries. Never empty, and within the total.
    Part {
        /// Offset of the first byte.
        start: u64,
        /// Offset behind the last byte.
        end_exclusive: u64,
        /// The content's size; none if the sender does not know it.
        total: Option<u64>,
    },
    /// `bytes */total`, in a 416.
    Unsatisfied {
        /// The content's size.
        total: u64,
    },
}

/// A text that is no `Content-Range` of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a Content-Range of bytes")]
pub struct ParseContentRangeError;

/// Which bytes of content of `size` bytes a `Range` header asks for.
///
/// A header that is malformed, has another unit or more than one range is ignored, as section 14.2 allows.
///
/// ```
/// use spegel::oci::{RangeOutcome, parse_range};
///
/// assert_eq!(parse_range(Some("bytes=2-99"), 10), RangeOutcome::Part { start: 2, end_exclusive: 10 });
/// assert_eq!(parse_range(Some("bytes=10-"), 10), RangeOutcome::Unsatisfiable);
/// assert_eq!(parse_range(None, 10), RangeOutcome::Whole);
/// ```
pub fn parse_range(header: Option<&str>, size: u64) -> RangeOutcome {
    header.and_then(RangeSpec::parse).map_or(RangeOutcome::Whole, |spec| spec.resolve(size))
}

/// A number of `1*DIGIT`. One that is too large is beyond any content, which the largest number is as well.
fn digits(text: &str) -> Option<u64> {
    let is_number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    is_number.then(|| text.parse().unwrap_or(u64::MAX))
}

// === impl RangeSpec ===

impl RangeSpec {
    /// The one range of bytes that a `Range` header names; nothing if the header is to be ignored.
    pub fn parse(header: &str) -> Option<Self> {
        let (unit, set) = header.split_once('=')?;
        if !unit.trim().eq_ignore_ascii_case("bytes") {
            return None;
        }
        let mut ranges = set.split(',').map(|range| range.trim_matches([' ', '\t'])).filter(|range| !range.is_empty());
        let (Some(range), None) = (ranges.next(), ranges.next()) else { return None };
        let (first, last) = range.split_once('-')?;
        if first.is_empty() {
            return digits(last).map(Self::Suffix);
        }
        let first = digits(first)?;
        let last = if last.is_empty() { None } else { Some(digits(last)?) };
        last.is_none_or(|last| first <= last).then_some(Self::From { first, last })
    }

    /// Which bytes it means of content of `size` bytes.
    pub fn resolve(self, size: u64) -> RangeOutcome {
        match self {
            Self::From { first, .. } if first >= size => RangeOutcome::Unsatisfiable,
            Self::From { first, last } => {
                let end_exclusive = last.map_or(size, |last| last.saturating_add(1).min(size));
                RangeOutcome::Part { start: first, end_exclusive }
            }
            Self::Suffix(0) => RangeOutcome::Unsatisfiable,
            // Satisfiable by section 14.1.2, but no Content-Range can say "no bytes".
            Self::Suffix(_) if size == 0 => RangeOutcome::Whole,
            Self::Suffix(length) => RangeOutcome::Part { start: size.saturating_sub(length), end_exclusive: size },
        }
    }
}

impl fmt::Display for RangeSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::From { first, last: Some(last) } => write!(f, "bytes={first}-{last}"),
            Self::From { first, last: None } => write!(f, "bytes={first}-"),
            Self::Suffix(length) => write!(f, "bytes=-{length}"),
        }
    }
}

// === impl ContentRange ===

impl fmt::Display for ContentRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Part { start, end_exclusive, total } => {
                write!(f, "bytes {start}-{}/", end_exclusive.saturating_sub(1))?;
                match total {
                    Some(total) => write!(f, "{total}"),
                    None => f.write_str("*"),
                }
            }
            Self::Unsatisfied { total } => write!(f, "bytes */{total}"),
        }
    }
}

impl FromStr for ContentRange {
    type Err = ParseContentRangeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_content_range(text).ok_or(ParseContentRangeError)
    }
}

fn parse_content_range(text: &str) -> Option<ContentRange> {
    // Unlike a request's range, a number too large is a lie about content that is there.
    let exact = |text: &str| digits(text).filter(|&n| n < u64::MAX);
    let (unit, rest) = text.trim().split_once(' ')?;
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (range, total) = rest.trim_start().split_once('/')?;
    let total = if total == "*" { None } else { Some(exact(total)?) };
    if range == "*" {
        return total.map(|total| ContentRange::Unsatisfied { total });
    }
    let (start, last) = range.split_once('-')?;
    let (start, end_exclusive) = (exact(start)?, exact(last)? + 1);
    let fits = start < end_exclusive && total.is_none_or(|total| end_exclusive <= total);
    fits.then_some(ContentRange::Part { start, end_exclusive, total })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn part(start: u64, end_exclusive: u64) -> RangeOutcome {
        RangeOutcome::Part { start, end_exclusive }
    }

    #[test]
    fn outcomes() {
        let cases = [
            ("bytes=0-", 10, part(0, 10)),
            ("bytes=0-0", 10, part(0, 1)),
            ("bytes=9-9", 10, part(9, 10)),
            ("bytes=3-99999999999999999999999", 10, part(3, 10)),
            ("bytes=0-18446744073709551615", 10, part(0, 10)),
            ("BYTES=1-2", 10, part(1, 3)),
            ("bytes= 1-2 ,", 10, part(1, 3)),
            ("bytes=-3", 10, part(7, 10)),
            ("bytes=-30", 10, part(0, 10)),
            ("bytes=-0", 10, RangeOutcome::Unsatisfiable),
            ("bytes=10-", 10, RangeOutcome::Unsatisfiable),
            ("bytes=10-20", 10, RangeOutcome::Unsatisfiable),
            ("bytes=99999999999999999999999-", 10, RangeOutcome::Unsatisfiable),
            ("bytes=0-", 0, RangeOutcome::Unsatisfiable),
            ("bytes=-1", 0, RangeOutcome::Whole),
            ("bytes=0-1,3-4", 10, RangeOutcome::Whole),
            ("bytes=2-1", 10, RangeOutcome::Whole),
            ("bytes=-", 10, RangeOutcome::Whole),
            ("bytes=", 10, RangeOutcome::Whole),
            ("bytes=+1-2", 10, RangeOutcome::Whole),
            ("bytes=1--2", 10, RangeOutcome::Whole),
            ("bytes=a-b", 10, RangeOutcome::Whole),
            ("bytes 0-1", 10, RangeOutcome::Whole),
            ("items=0-1", 10, RangeOutcome::Whole),
            ("", 10, RangeOutcome::Whole),
        ];
        for (header, size, expected) in cases {
            assert_eq!(parse_range(Some(header), size), expected, "{header} of {size}");
        }
        assert_eq!(parse_range(None, 10), RangeOutcome::Whole);
    }

    #[test]
    fn content_ranges() {
        let part: ContentRange = "bytes 2-4/10".parse().unwrap();
        assert_eq!(part, ContentRange::Part { start: 2, end_exclusive: 5, total: Some(10) });
        assert_eq!("bytes */10".parse(), Ok(ContentRange::Unsatisfied { total: 10 }));
        for bad in [
            "bytes 2-4",
            "bytes 4-2/10",
            "bytes 2-10/10",
            "bytes */*",
            "items 0-1/2",
            "bytes 0-18446744073709551615/*",
            "bytes=0-1/2",
            "",
        ] {
            assert_eq!(bad.parse::<ContentRange>(), Err(ParseContentRangeError), "{bad}");
        }
    }
}
