//! Figures for people.

use std::time::Duration;

/// Bytes in the unit that keeps three digits or so: `12.3 MiB`.
pub(super) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value < 99.95 { format!("{value:.1} {}", UNITS[unit]) } else { format!("{value:.0} {}", UNITS[unit]) }
}

/// A time in the unit that keeps it short.
pub(super) fn time(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match seconds {
        s if s < 0.000_999_5 => format!("{:.0} µs", s * 1e6),
        s if s < 0.009_995 => format!("{:.2} ms", s * 1e3),
        s if s < 0.999_5 => format!("{:.0} ms", s * 1e3),
        s if s < 9.995 => format!("{s:.2} s"),
        s if s < 119.5 => format!("{s:.0} s"),
        s if s < 7170.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.0} h", s / 3600.0),
        s => format!("{:.0} days", s / 86_400.0),
    }
}

/// A share in percent; `none` of nothing.
pub(super) fn percent(part: u64, whole: u64) -> Option<String> {
    let share = (whole > 0).then(|| 100.0 * part as f64 / whole as f64)?;
    // No rounding makes all of what is nearly all, or nothing of a little.
    Some(match share {
        s if part == whole => format!("{s:.0} %"),
        s if s > 99.0 => format!("{:.1} %", s.min(99.9)),
        s if s > 0.0 && s < 1.0 => format!("{:.1} %", s.max(0.1)),
        s => format!("{s:.0} %"),
    })
}

/// `1 image`, `2 images`.
pub(super) fn count(number: usize, one: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {one}{plural}", grouped(number))
}

/// With narrow spaces between groups of three digits.
pub(super) fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// The beginning of a digest, enough to tell it from others.
pub(super) fn short(digest: &str) -> &str {
    let end = digest.find(':').map_or(0, |colon| colon + 1) + 12;
    digest.get(..end).unwrap_or(digest)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn figures_are_short_and_do_not_lie() {
        let told = [0, 1023, 1024, 150 << 10, 1 << 20, (1 << 30) - 1, u64::MAX].map(bytes);
        assert_eq!(told, ["0 B", "1023 B", "1.0 KiB", "150 KiB", "1.0 MiB", "1.0 GiB", "16.0 EiB"]);
        let told = [50, 1_500, 25_000, 999_400, 1_000_000, 90_000_000, 3_600_000_000]
            .map(|us| time(Duration::from_micros(us)));
        assert_eq!(told, ["50 µs", "1.50 ms", "25 ms", "999 ms", "1.00 s", "90 s", "60 min"]);
        let told =
            [(0, 10), (1, 10_000), (1, 2), (9_999, 10_000), (7, 7)].map(|(part, whole)| percent(part, whole).unwrap());
        assert_eq!(told, ["0 %", "0.1 %", "50 %", "99.9 %", "100 %"]);
        assert_eq!(percent(0, 0), None);
        assert_eq!([count(1, "image"), count(1234, "image")], ["1 image", "1\u{202f}234 images"]);
        assert_eq!([short("sha256:0123456789abcdef"), short("short")], ["sha256:0123456789ab", "short"]);
    }
}
