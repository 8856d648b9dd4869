//! The table on a terminal, drawn anew until somebody has seen enough.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Result;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Alignment, Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Paragraph, Row, Table};
use ratatui::{DefaultTerminal, Frame};

use super::{COLUMNS, fetch, fields, left_out, origin, sort};
use crate::cli::PeersOrder;
use crate::ebpf::Report;

/// The keys that sort, which stand in the last line.
const KEYS: [(char, &str, PeersOrder); 6] = [
    ('b', "bytes", PeersOrder::Bytes),
    ('s', "speed", PeersOrder::Rate),
    ('r', "round trip", PeersOrder::Rtt),
    ('t', "resent", PeersOrder::Retransmits),
    ('e', "errors", PeersOrder::Errors),
    ('a', "address", PeersOrder::Address),
];

/// What is on the screen.
struct Screen {
    order: PeersOrder,
    now: Report,
    /// The report before, and the seconds between.
    before: Option<(Report, f64)>,
    /// Why the newest figures are not the newest.
    trouble: Option<String>,
}

/// Draws until `q`, Escape or Control-C.
///
/// # Errors
/// The process does not answer at the start, or there is no terminal.
pub(super) fn run(addr: SocketAddr, order: PeersOrder, interval: Duration) -> Result<()> {
    let mut screen = Screen { order, now: fetch(addr)?, before: None, trouble: None };
    let mut terminal = ratatui::try_init()?;
    let result = draw(&mut terminal, &mut screen, addr, interval);
    ratatui::restore();
    result
}

fn draw(terminal: &mut DefaultTerminal, screen: &mut Screen, addr: SocketAddr, interval: Duration) -> Result<()> {
    let mut asked = Instant::now();
    loop {
        terminal.draw(|frame| screen.render(frame))?;
        if event::poll(interval.saturating_sub(asked.elapsed()))? {
            if let Event::Key(key) = event::read()?
                && key.kind == KeyEventKind::Press
                && screen.press(key.code, key.modifiers)
            {
                return Ok(());
            }
            continue;
        }
        let seconds = std::mem::replace(&mut asked, Instant::now()).elapsed().as_secs_f64();
        match fetch(addr) {
            Ok(report) => screen.show(report, seconds),
            Err(error) => screen.trouble = Some(format!("{error:#}")),
        }
    }
}

// === impl Screen ===

impl Screen {
    /// Whether it is enough.
    fn press(&mut self, code: KeyCode, modifiers: KeyModifiers) -> bool {
        let KeyCode::Char(key) = code else { return code == KeyCode::Esc };
        if let Some((.., order)) = KEYS.iter().find(|(known, ..)| *known == key) {
            self.order = *order;
        }
        key == 'q' || (key == 'c' && modifiers.contains(KeyModifiers::CONTROL))
    }

    fn show(&mut self, report: Report, seconds: f64) {
        self.before = Some((std::mem::replace(&mut self.now, report), seconds));
        self.trouble = None;
    }

    fn render(&mut self, frame: &mut Frame<'_>) {
        let areas = Layout::vertical([Constraint::Length(1), Constraint::Min(1), Constraint::Length(1)]);
        let [top, middle, bottom] = areas.areas(frame.area());
        let before = self.before.as_ref().map(|(report, seconds)| (report, *seconds));
        sort(&mut self.now.peers, self.order, before);
        let trouble = self.trouble.as_ref().map(|trouble| format!("not the newest: {trouble}"));
        let (shown, all) = (usize::from(middle.height.saturating_sub(1)), self.now.peers.len());
        let mut told = trouble.unwrap_or_else(|| origin(&self.now));
        // What does not fit comes first: the line may be longer than the screen is wide.
        if self.now.more_peers > 0 {
            told = format!("{}; {told}", left_out(self.now.more_peers, all));
        } else if all > shown {
            told = format!("{} rows more; {told}", all - shown);
        }
        frame.render_widget(Paragraph::new(told), top);
        let widths = COLUMNS.map(|(_, width)| Constraint::Length(u16::try_from(width).unwrap_or(u16::MAX)));
        let aligned = |number: usize, text: String| {
            let side = if number < 2 { Alignment::Left } else { Alignment::Right };
            Cell::from(Line::from(text).alignment(side))
        };
        let cells = |texts: [String; COLUMNS.len()]| {
            Row::new(texts.into_iter().enumerate().map(|(number, text)| aligned(number, text)).collect::<Vec<_>>())
        };
        let rows = self.now.peers.iter().take(usize::from(middle.height)).map(|row| cells(fields(row, before)));
        let head = cells(COLUMNS.map(|(name, _)| name.to_owned()));
        let head = head.style(Style::new().add_modifier(Modifier::BOLD));
        frame.render_widget(Table::new(rows, widths).header(head), middle);
        let keys: Vec<_> = KEYS.iter().map(|(key, what, _)| format!("{key} {what}")).collect();
        frame.render_widget(Paragraph::new(format!("sort: {}   q end", keys.join("  "))), bottom);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::tests::{report, row};
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn lines(screen: &mut Screen) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(140, 6)).unwrap();
        terminal.draw(|frame| screen.render(frame)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let line = |y| (0..140).map(|x| buffer[(x, y)].symbol().to_owned()).collect::<String>().trim_end().to_owned();
        (0..6).map(line).collect()
    }

    #[test]
    fn keys_sort_and_end() {
        let now = report(vec![row(1, 10), row(2, 20)]);
        let mut screen = Screen { order: PeersOrder::Address, now: now.clone(), before: None, trouble: None };
        assert!(lines(&mut screen)[2].starts_with("10.0.0.1 "));
        assert!(!screen.press(KeyCode::Char('b'), KeyModifiers::NONE));
        assert!(lines(&mut screen)[2].starts_with("10.0.0.2 "));
        screen.show(report(vec![row(1, 2058), row(2, 20)]), 2.0);
        let shown = lines(&mut screen);
        assert!(shown[2].starts_with("10.0.0.1 ") && shown[2].contains("1.0 KiB"), "{shown:?}");
        assert!(shown[5].contains("q end"));
        screen.now.peers.extend((3..=7).map(|n| row(n, 0)));
        assert!(lines(&mut screen)[0].starts_with("4 rows more; "), "{:?}", lines(&mut screen));
        screen.now.more_peers = 5;
        assert!(
            lines(&mut screen)[0].starts_with("5 more: only the 7 with the most bytes"),
            "{:?}",
            lines(&mut screen)
        );
        screen.now = report(vec![]);
        screen.trouble = Some("gone".into());
        assert_eq!(lines(&mut screen)[0], "not the newest: gone");
        assert!(screen.press(KeyCode::Esc, KeyModifiers::NONE));
        assert!(screen.press(KeyCode::Char('c'), KeyModifiers::CONTROL));
    }
}
