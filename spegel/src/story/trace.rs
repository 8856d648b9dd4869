//! The id of a request on all nodes that have a part in it, as [W3C Trace Context](https://www.w3.org/TR/trace-context/) writes it.

use std::fmt;

use rand::Rng as _;

/// The request header that carries it.
pub const TRACE_HEADER: &str = "traceparent";

/// The length of version 0's value: `00-`, 32 digits, `-`, 16 digits, `-`, 2 digits.
const LENGTH: usize = 55;
/// A later version may have more behind that, which is passed over, but not a page of it.
const LONGEST: usize = 256;

/// Which request this is: the id of the whole, that of this node's part in it, and whether somebody up the line records it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trace {
    id: u128,
    span: u64,
    is_sampled: bool,
}

impl Trace {
    /// The one that a request's [`TRACE_HEADER`] tells; a new one if it tells none, or what is none.
    pub fn of(value: Option<&[u8]>) -> Self {
        let (id, is_sampled) =
            value.and_then(parse).unwrap_or_else(|| (rand::rng().random_range(1..=u128::MAX), false));
        Self { id, span: rand::rng().random_range(1..=u64::MAX), is_sampled }
    }

    /// Its id, 32 hexadecimal digits.
    pub fn id(&self) -> impl fmt::Display + fmt::Debug + use<> {
        Id(self.id)
    }

    /// The [`TRACE_HEADER`]'s value for requests that this one causes.
    pub fn header(&self) -> String {
        format!("00-{:032x}-{:016x}-{:02x}", self.id, self.span, u8::from(self.is_sampled))
    }
}

#[derive(Clone, Copy)]
struct Id(u128);

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The trace's id, and whether it is recorded.
fn parse(value: &[u8]) -> Option<(u128, bool)> {
    if value.len() < LENGTH || value.len() > LONGEST {
        return None;
    }
    let (known, rest) = value.split_at(LENGTH);
    let version = hex(&known[..2])?;
    let is_whole = if version == 0 { rest.is_empty() } else { rest.first().is_none_or(|byte| *byte == b'-') };
    let has_dashes = [2, 35, 52].iter().all(|at| known[*at] == b'-');
    let (id, parent, flags) = (hex(&known[3..35])?, hex(&known[36..52])?, hex(&known[53..])?);
    (version != 0xff && is_whole && has_dashes && id != 0 && parent != 0).then_some((id, flags & 1 == 1))
}

/// Hexadecimal digits, small ones only.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |number: u128, digit| {
        let value = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    const ID: &str = "0af7651916cd43dd8448eb211c80319c";

    fn taken(value: &str) -> bool {
        Trace::of(Some(value.as_bytes())).id().to_string() == ID
    }

    #[test]
    fn a_good_one_is_taken_over_and_passed_on_with_our_own_part() {
        let trace = Trace::of(Some(GOOD.as_bytes()));
        let passed = trace.header();
        assert!(passed.starts_with(&format!("00-{ID}-")) && passed.ends_with("-01") && passed != GOOD, "{passed}");
        assert!(taken(&passed));
        assert!(Trace::of(Some(GOOD.replace("-01", "-fe").as_bytes())).header().ends_with("-00"), "unknown flags");
        assert!(
            taken(&GOOD.replacen("00", "01", 1)) && taken(&(GOOD.replacen("00", "01", 1) + "-more")),
            "later versions"
        );
    }

    #[test]
    fn what_is_none_is_replaced() {
        let zeros = |count: usize| "0".repeat(count);
        for wrong in [
            String::new(),
            "00".into(),
            GOOD.to_uppercase(),
            GOOD[1..].into(),
            format!("{GOOD}-"),
            format!("{GOOD}\r\nX-Evil: 1"),
            GOOD.replacen("00", "ff", 1),
            GOOD.replacen("00", "01", 1) + "more",
            GOOD.replacen("00", "01", 1) + "-" + &zeros(300),
            GOOD.replacen('-', "+", 1),
            GOOD.replace(ID, &zeros(32)),
            GOOD.replace("b7ad6b7169203331", &zeros(16)),
            GOOD.replace("0a", "0g"),
            GOOD.replace("0af", "é1"),
        ] {
            assert!(!taken(&wrong), "{wrong}");
            let made = Trace::of(Some(wrong.as_bytes())).header();
            assert!(parse(made.as_bytes()).is_some(), "{wrong}: {made}");
        }
    }

    #[test]
    fn new_ones_differ() {
        assert_ne!(Trace::of(None).id().to_string(), Trace::of(None).id().to_string());
    }
}
