//! A storm as a picture: what each node had over time, and where it came from.

use std::fmt::Write as _;

use spegel_benches::storm::Stormed;

const WIDTH: f64 = 860.0;
const CURVES: f64 = 320.0;
const LEFT: f64 = 70.0;
const BAR: f64 = 18.0;
/// Told apart by eyes that see no red or green too (Okabe and Ito).
const COLOURS: [&str; 8] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a500", "#555555"];

/// An SVG 1.1 document.
pub(super) fn draw(stormed: &Stormed) -> String {
    let end = stormed.samples.last().map_or(1.0, |sample| sample.at).max(0.1);
    let most = stormed.size.max(1) as f64;
    let bars = CURVES + 60.0;
    let height = bars + BAR * stormed.pulls.len() as f64 + 60.0;
    let x = |seconds: f64| LEFT + seconds / end * (WIDTH - LEFT - 20.0);
    let y = |bytes: f64| 20.0 + (1.0 - (bytes / most).min(1.0)) * (CURVES - 20.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    for quarter in 0..=4 {
        let share = f64::from(quarter) / 4.0;
        let (at, mib) = (y(share * most), share * most / f64::from(1 << 20));
        let _ = writeln!(svg, "<path d=\"M{LEFT} {at:.1}H{}\" stroke=\"#ddd\"/>", WIDTH - 20.0);
        let _ =
            writeln!(svg, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{mib:.0} MiB</text>", LEFT - 6.0, at + 4.0);
        let seconds = share * end;
        let below = CURVES + 16.0;
        let _ =
            writeln!(svg, "<text x=\"{:.1}\" y=\"{below}\" text-anchor=\"middle\">{seconds:.1} s</text>", x(seconds));
    }
    let solo = x(stormed.solo.min(end));
    let _ = writeln!(svg, "<path d=\"M{solo:.1} 20V{CURVES}\" stroke=\"#000\" stroke-dasharray=\"4 4\"/>");
    let _ = writeln!(svg, "<text x=\"{:.1}\" y=\"14\" text-anchor=\"end\">one pull alone</text>", solo + 40.0);
    let nodes = stormed.samples.first().map_or(0, |sample| sample.nodes.len());
    for number in 0..nodes {
        let points = stormed.samples.iter().map(|sample| (x(sample.at), y(sample.nodes[number].bytes as f64)));
        let points: Vec<String> = points.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let colour = COLOURS[number % COLOURS.len()];
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>",
            points.join(" ")
        );
    }
    sources(&mut svg, stormed, bars);
    svg + "</svg>\n"
}

/// A bar a node, in the colours of those that gave it its bytes; upstream's part is black.
fn sources(svg: &mut String, stormed: &Stormed, top: f64) {
    let _ =
        writeln!(svg, "<text x=\"{LEFT}\" y=\"{}\">who gave each node its bytes (black: upstream)</text>", top - 8.0);
    let scale = (WIDTH - LEFT - 20.0) / stormed.size.max(1) as f64;
    for (row, pull) in stormed.pulls.iter().enumerate() {
        let at = top + BAR * row as f64;
        let own = COLOURS[pull.node % COLOURS.len()];
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"{own}\">node {}</text>",
            LEFT - 6.0,
            at + 12.0,
            pull.node
        );
        let upstream = std::iter::once(("#000", pull.from_upstream));
        let peers = pull.from_peers.iter().map(|(number, bytes)| (COLOURS[number % COLOURS.len()], *bytes));
        let mut left = LEFT;
        for (colour, bytes) in upstream.chain(peers) {
            let width = bytes as f64 * scale;
            let _ = writeln!(
                svg,
                "<rect x=\"{left:.1}\" y=\"{at:.1}\" width=\"{width:.1}\" height=\"{}\" fill=\"{colour}\"/>",
                BAR - 4.0
            );
            left += width;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use spegel_benches::storm::{NodeSample, Pulled, Sample, Told};

    use super::*;

    #[test]
    fn a_storm_is_drawn_whole() {
        let pull = |node, from_upstream, from_peers| Pulled {
            node,
            began: 0.0,
            seconds: 2.0,
            failed: None,
            killed: false,
            from_upstream,
            from_peers,
            told: Told::default(),
        };
        let sample = |at, bytes: [u64; 2]| Sample { at, nodes: bytes.map(|bytes| NodeSample { bytes }).to_vec() };
        let stormed = Stormed {
            solo: 1.5,
            pulls: vec![pull(0, 100, vec![]), pull(1, 0, vec![(0, 100)])],
            upstream_requests: [1, 2],
            upstream_bytes: 100,
            size: 100,
            samples: vec![sample(0.2, [10, 0]), sample(2.0, [100, 100])],
            busy: 0.5,
        };
        let svg = draw(&stormed);
        assert_eq!(svg.matches("<polyline").count(), 2);
        // The ground, and a part for each source.
        assert_eq!(svg.matches("<rect").count(), 1 + 3);
        assert!(svg.ends_with("</svg>\n"));
        assert_eq!(stormed.depth(), 1);
    }
}
