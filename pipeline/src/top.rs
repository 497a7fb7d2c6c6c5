//! `tidemill top`: a live view of running pipelines, from the snapshots that `run --listen` serves.
//!
//! What is drawn depends on two snapshots, the time between them and the size of the screen alone ([`draw`]).

use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;
use ratatui::Frame;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{Event, KeyCode, KeyModifiers, poll, read};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{Block, Cell, Gauge, Row, Table};

use crate::clock::Clock;
use crate::observe::{PipelineSnapshot, Snapshot};
use crate::summary::thousands;

const INTERVAL: Duration = Duration::from_millis(500);
const MAX_SNAPSHOT_BYTES: u64 = 16 << 20;
/// Partitions that are shown, those with the most lag first.
const MAX_PARTITIONS: usize = 8;
const MAX_TENANTS: usize = 6;

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  tidemill run --listen 127.0.0.1:9464 pipeline.yaml &\n  tidemill top")]
pub struct TopArgs {
    /// Where a run serves its metrics
    #[arg(default_value = "http://127.0.0.1:9464")]
    url: String,
    /// Print one view and end
    #[arg(long)]
    once: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum TopError {
    #[error("no run serves its figures at {url}: {reason}")]
    NoRun { url: String, reason: String },
    #[error("cannot draw")]
    Draw(#[source] std::io::Error),
}

impl TopError {
    /// What the user can do.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::NoRun { .. } => Some("start it with: tidemill run --listen 127.0.0.1:9464 …".to_owned()),
            Self::Draw(_) => None,
        }
    }
}

/// A snapshot and when it was taken.
#[derive(Clone, Debug, Default)]
pub struct Taken {
    pub snapshot: Snapshot,
    pub at: Duration,
}

/// Shows the view until it is quit, or once.
pub fn top(args: &TopArgs) -> Result<(), TopError> {
    let clock = Clock::start();
    let mut before = take(args, clock)?;
    std::thread::sleep(INTERVAL);
    let mut now = take(args, clock)?;
    if args.once || !std::io::stdout().is_terminal() {
        println!("{}", text(&before, &now, 100, 40));
        return Ok(());
    }
    let mut terminal = ratatui::init();
    let result = loop {
        if let Err(error) = terminal.draw(|frame| draw(frame, &before, &now)) {
            break Err(TopError::Draw(error));
        }
        match quits() {
            Ok(true) => break Ok(()),
            Ok(false) => {}
            Err(error) => break Err(TopError::Draw(error)),
        }
        match take(args, clock) {
            Ok(taken) => (before, now) = (now, taken),
            Err(error) => break Err(error),
        }
    };
    ratatui::restore();
    result
}

/// Waits for a key or for the next look.
fn quits() -> std::io::Result<bool> {
    if !poll(INTERVAL)? {
        return Ok(false);
    }
    let Event::Key(key) = read()? else { return Ok(false) };
    let is_interrupt = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    Ok(is_interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc))
}

fn take(args: &TopArgs, clock: Clock) -> Result<Taken, TopError> {
    let url = args.url.trim_end_matches('/');
    let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
    let fail = |reason: String| TopError::NoRun { url: url.clone(), reason };
    let config = ureq::config::Config::builder().timeout_global(Some(Duration::from_secs(5))).build();
    let response = ureq::Agent::new_with_config(config).get(format!("{url}/snapshot")).call();
    let mut response = response.map_err(|error| fail(error.to_string()))?;
    let text = response.body_mut().with_config().limit(MAX_SNAPSHOT_BYTES).read_to_string();
    let text = text.map_err(|error| fail(error.to_string()))?;
    let snapshot = serde_json::from_str(&text).map_err(|error| fail(error.to_string()))?;
    Ok(Taken { snapshot, at: clock.elapsed() })
}

/// The view as plain text.
pub fn text(before: &Taken, now: &Taken, width: u16, height: u16) -> String {
    let mut terminal = ratatui::Terminal::new(TestBackend::new(width, height)).expect("memory does not fail");
    terminal.draw(|frame| draw(frame, before, now)).expect("memory does not fail");
    let buffer = terminal.backend().buffer();
    let rows = buffer.content().chunks(width as usize).map(|row| {
        let text: String = row.iter().map(|cell| cell.symbol()).collect();
        text.trim_end().to_owned()
    });
    let mut rows: Vec<String> = rows.collect();
    while rows.last().is_some_and(String::is_empty) {
        rows.pop();
    }
    rows.join("\n")
}

/// Draws all pipelines below each other.
pub fn draw(frame: &mut Frame<'_>, before: &Taken, now: &Taken) {
    let seconds = (now.at.saturating_sub(before.at)).as_secs_f64().max(0.001);
    let pipelines = &now.snapshot.pipelines;
    if pipelines.is_empty() {
        frame.render_widget(Line::from("the model is loading").italic(), frame.area());
        return;
    }
    let areas = Layout::vertical(pipelines.iter().map(|_| Constraint::Fill(1))).split(frame.area());
    for (pipeline, &area) in pipelines.iter().zip(areas.iter()) {
        let earlier = before.snapshot.pipelines.iter().find(|earlier| earlier.name == pipeline.name);
        draw_pipeline(frame, area, earlier.unwrap_or(pipeline), pipeline, seconds);
    }
}

fn draw_pipeline(
    frame: &mut Frame<'_>,
    area: Rect,
    before: &PipelineSnapshot,
    now: &PipelineSnapshot,
    seconds: f64,
) {
    let is_paused = now.kafka.as_ref().is_some_and(|kafka| kafka.is_paused);
    let state = match &now.failed {
        Some(reason) => format!(" failed: {reason} ").fg(Color::Red),
        None if is_paused => " source held back, partitions paused ".fg(Color::Yellow),
        None if now.is_held_back => " source held back ".fg(Color::Yellow),
        None => " running ".fg(Color::Green),
    };
    let title = Line::from(vec![format!(" {} ", now.name).bold(), format!("({})", now.model).into(), state]);
    let block = Block::bordered().title(title).title_bottom(" q quits ");
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let kafka_height = now.kafka.as_ref().map_or(0, |kafka| kafka.partitions.len().min(MAX_PARTITIONS) + 3);
    let tenants_height = if now.tenants.len() > 1 { now.tenants.len().min(MAX_TENANTS) + 2 } else { 0 };
    let [operators, credit, kv, kafka, tenants] = Layout::vertical([
        Constraint::Length(11),
        Constraint::Length(1),
        Constraint::Length(now.engines.len().max(1) as u16),
        Constraint::Length(kafka_height as u16),
        Constraint::Length(tenants_height as u16),
    ])
    .areas(inner);
    draw_operators(frame, operators, before, now, seconds);
    let used = now.documents_in_flight as f64 / now.credit_documents.max(1) as f64;
    let label = format!(
        "credit {} of {} documents, {} of {} MiB, {} tokens, {} epochs",
        thousands(now.documents_in_flight),
        thousands(now.credit_documents),
        now.bytes_in_flight >> 20,
        now.credit_bytes >> 20,
        thousands(now.tokens_in_flight),
        now.epochs_in_flight
    );
    gauge(frame, credit, used, label, Color::Blue);
    let areas = Layout::vertical(now.engines.iter().map(|_| Constraint::Length(1))).split(kv);
    for ((number, engine), &area) in now.engines.iter().enumerate().zip(areas.iter()) {
        let share = engine.kv_pages_in_use as f64 / engine.kv_pages_total.max(1) as f64;
        let label = format!(
            "engine {number}: KV {} of {} pages, {} cached, {} running, {} waiting, {} preempted",
            engine.kv_pages_in_use,
            engine.kv_pages_total,
            engine.kv_pages_cached,
            engine.running,
            engine.waiting,
            engine.preemptions
        );
        gauge(frame, area, share, label, Color::Magenta);
    }
    draw_kafka(frame, kafka, now);
    draw_tenants(frame, tenants, now);
}

fn gauge(frame: &mut Frame<'_>, area: Rect, share: f64, label: String, color: Color) {
    let gauge = Gauge::default().ratio(share.clamp(0.0, 1.0)).label(label);
    frame.render_widget(gauge.gauge_style(Style::new().fg(color)), area);
}

fn draw_operators(
    frame: &mut Frame<'_>,
    area: Rect,
    before: &PipelineSnapshot,
    now: &PipelineSnapshot,
    seconds: f64,
) {
    let row = |name: &'static str, what: &'static str, value: fn(&PipelineSnapshot) -> u64| {
        let rate = value(now).saturating_sub(value(before)) as f64 / seconds;
        Row::new([
            Cell::from(name),
            Cell::from(what),
            Cell::from(Line::from(thousands(value(now))).right_aligned()),
            Cell::from(Line::from(format!("{}/s", thousands(rate.round() as u64))).right_aligned()),
        ])
    };
    // What is there now has no rate.
    let level = |name: &'static str, what: &'static str, value: u64| {
        let value = Cell::from(Line::from(thousands(value)).right_aligned());
        Row::new([Cell::from(name), Cell::from(what), value, Cell::default()])
    };
    let rows = [
        row("source", "documents", |one| one.documents_read),
        level("tokenize", "batches waiting", now.unrendered),
        row("recall", "from the journal", |one| one.recalled),
        level("group", "documents waiting", now.grouped),
        row("infer", "prompt tokens", |one| one.prompt_tokens),
        row("", "computed", |one| one.computed_tokens),
        row("", "reused", |one| one.reused_tokens),
        row("", "answer tokens", |one| one.output_tokens),
        row("sink", "documents", |one| one.documents_done),
        row("errors", "documents", |one| one.errors),
    ];
    let widths =
        [Constraint::Length(10), Constraint::Length(20), Constraint::Length(16), Constraint::Length(14)];
    let header = Row::new(["operator", "", "           total", "          rate"]).underlined();
    frame.render_widget(Table::new(rows, widths).header(header), area);
}

fn draw_kafka(frame: &mut Frame<'_>, area: Rect, now: &PipelineSnapshot) {
    let Some(kafka) = &now.kafka else { return };
    let mut partitions: Vec<_> = kafka.partitions.iter().collect();
    partitions.sort_by_key(|partition| std::cmp::Reverse(partition.lag));
    let number = |value: Option<i64>| {
        let text = value.map_or("–".to_owned(), |value| thousands(value.max(0) as u64));
        Cell::from(Line::from(text).right_aligned())
    };
    let rows = partitions.iter().take(MAX_PARTITIONS).map(|partition| {
        Row::new([
            Cell::from(format!("{}-{}", partition.topic, partition.partition)),
            number(partition.position),
            number(partition.committed),
            number(partition.end),
            number(partition.lag),
        ])
    });
    let widths = [
        Constraint::Length(28),
        Constraint::Length(12),
        Constraint::Length(12),
        Constraint::Length(12),
        Constraint::Length(12),
    ];
    let total: i64 = partitions.iter().filter_map(|partition| partition.lag).sum();
    let header =
        Row::new(["partition", "    position", "   committed", "         end", "         lag"]).underlined();
    let title = format!(
        "lag {} in {} partitions, {} transactions, {} aborted, {} rebalances",
        thousands(total.max(0) as u64),
        partitions.len(),
        thousands(kafka.transactions_committed),
        thousands(kafka.transactions_aborted),
        kafka.rebalances
    );
    let [heading, table] = Layout::vertical([Constraint::Length(1), Constraint::Fill(1)]).areas(area);
    frame.render_widget(Line::from(title).bold(), heading);
    frame.render_widget(Table::new(rows, widths).header(header), table);
}

fn draw_tenants(frame: &mut Frame<'_>, area: Rect, now: &PipelineSnapshot) {
    if now.tenants.len() < 2 {
        return;
    }
    let rows = now.tenants.iter().take(MAX_TENANTS).map(|(name, tenant)| {
        let wait = tenant.wait_seconds.sum / tenant.wait_seconds.count().max(1) as f64;
        Row::new([
            name.clone(),
            thousands(tenant.documents),
            thousands(tenant.waiting),
            thousands(tenant.tokens_in_flight),
            format!("{wait:.2} s"),
        ])
    });
    let widths = [28, 12, 12, 12, 12].map(Constraint::Length);
    let header = Row::new(["tenant", "documents", "waiting", "tokens", "mean wait"]).underlined();
    frame.render_widget(Table::new(rows, widths).header(header), area);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::{EngineSnapshot, KafkaView, PartitionView};

    fn taken(done: u64, seconds: u64) -> Taken {
        let partition = |number, lag| PartitionView {
            topic: "articles".to_owned(),
            partition: number,
            position: Some(900),
            committed: Some(800),
            end: Some(800 + lag),
            lag: Some(lag),
        };
        let pipeline = PipelineSnapshot {
            name: "news".to_owned(),
            model: "fake".to_owned(),
            documents_done: done,
            documents_in_flight: 1024,
            credit_documents: 4096,
            grouped: 700,
            engines: vec![EngineSnapshot {
                kv_pages_total: 100,
                kv_pages_in_use: 25,
                ..EngineSnapshot::default()
            }],
            kafka: Some(KafkaView {
                partitions: vec![partition(0, 5), partition(1, 12_345)],
                is_paused: true,
                ..KafkaView::default()
            }),
            ..PipelineSnapshot::default()
        };
        Taken { snapshot: Snapshot { pipelines: vec![pipeline] }, at: Duration::from_secs(seconds) }
    }

    #[test]
    fn the_view_shows_rates_lag_and_who_is_held_back() {
        let view = text(&taken(1000, 1), &taken(3000, 3), 90, 24);
        for words in [
            "news (fake) source held back",
            "1,000/s",
            "1,024 of 4,096 documents",
            "25 of 100 pages",
            "lag 12,350",
            "group      documents waiting                 700",
        ] {
            assert!(view.contains(words), "{words} is not in\n{view}");
        }
        let most = view.find("articles-1").unwrap();
        assert!(most < view.find("articles-0").unwrap(), "the most lag comes first");
        let mut full = taken(0, 1);
        full.snapshot.pipelines[0].kafka = None;
        assert!(text(&full, &full, 90, 24).contains("(fake) running"));
        full.snapshot.pipelines[0].is_held_back = true;
        assert!(text(&full, &full, 90, 24).contains("(fake) source held back"), "whatever the source is");
        // A small screen shows less and does not fail.
        text(&taken(0, 0), &taken(1, 0), 20, 5);
        text(&Taken::default(), &Taken::default(), 1, 1);
    }
}
