//! The table at the end of a run.

use std::fmt::Write;
use std::time::Duration;

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;
use tidemill_operators::counters::Counters;

/// The figures of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Where the model ran.
    pub device: String,
    pub documents: u64,
    pub errors: u64,
    /// Answers that an earlier, interrupted run had journaled.
    pub recalled: u64,
    pub prompt_tokens: u64,
    pub computed_tokens: u64,
    /// Those among them that were computed again after a preemption.
    pub recomputed_tokens: u64,
    /// Different prefixes of the prompts, which is the least that can be computed; estimated within half a percent.
    pub distinct_tokens: u64,
    pub reused_tokens: u64,
    pub output_tokens: u64,
    /// Sequences that gave up their KV pages to others and were computed again.
    pub preemptions: u64,
    pub wall_ms: u64,
    /// Largest resident size of the process; 0 where the system does not tell.
    pub peak_memory_bytes: u64,
    pub peak_documents_in_flight: u64,
    /// Tokens of prompts, with the answers they may get, that were rendered and not yet answered.
    pub peak_tokens_in_flight: u64,
}

impl Summary {
    pub fn new(device: &str, counters: &Counters, peak_tokens_in_flight: u64, wall: Duration) -> Self {
        Self {
            device: device.to_owned(),
            documents: Counters::get(&counters.documents_done),
            errors: Counters::get(&counters.errors),
            recalled: Counters::get(&counters.recalled),
            prompt_tokens: Counters::get(&counters.prompt_tokens),
            computed_tokens: Counters::get(&counters.computed_tokens),
            recomputed_tokens: Counters::get(&counters.recomputed_tokens),
            distinct_tokens: Counters::get(&counters.distinct_tokens),
            reused_tokens: Counters::get(&counters.reused_tokens),
            output_tokens: Counters::get(&counters.output_tokens),
            preemptions: Counters::get(&counters.preemptions),
            wall_ms: wall.as_millis() as u64,
            peak_memory_bytes: peak_memory_bytes(),
            peak_documents_in_flight: Counters::get(&counters.peak_in_flight),
            peak_tokens_in_flight,
        }
    }

    /// As a table.
    pub fn render(&self) -> String {
        let seconds = (self.wall_ms as f64 / 1000.0).max(0.001);
        let rate = |tokens: u64| format!("{:.0}", tokens as f64 / seconds);
        let rows = [
            ("documents", thousands(self.documents)),
            ("errors", thousands(self.errors)),
            ("from the journal", thousands(self.recalled)),
            ("prompt tokens", thousands(self.prompt_tokens)),
            ("  computed", thousands(self.computed_tokens)),
            ("  computed ÷ distinct", self.computed_ratio()),
            ("  reused", format!("{} ({})", thousands(self.reused_tokens), self.reused_share())),
            ("output tokens", thousands(self.output_tokens)),
            ("preemptions", thousands(self.preemptions)),
            ("  recomputed", thousands(self.recomputed_tokens)),
            ("prompt tokens/s", rate(self.prompt_tokens)),
            ("output tokens/s", rate(self.output_tokens)),
            ("device", self.device.clone()),
            ("wall time", format!("{seconds:.1} s")),
            ("peak memory", format!("{:.0} MiB", self.peak_memory_bytes as f64 / (1 << 20) as f64)),
        ];
        let mut table = Table::new();
        table.load_style(NOTHING);
        for (name, value) in rows {
            table.add_row([name.to_owned(), value]);
        }
        if let Some(column) = table.column_mut(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table.to_string()
    }

    /// 1 is the optimum: every prefix computed once.
    fn computed_ratio(&self) -> String {
        match self.distinct_tokens {
            0 => "–".to_owned(),
            distinct => format!("{:.3}", self.computed_tokens as f64 / distinct as f64),
        }
    }

    fn reused_share(&self) -> String {
        format!("{:.0} %", share(self.reused_tokens, self.prompt_tokens))
    }
}

/// Percent; 0 of nothing is 0.
pub fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 }
}

/// 1234567 as `1,234,567`.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        let _ = write!(text, "{digit}");
    }
    text
}

/// The process's high-water mark, as Linux counts it.
pub fn peak_memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(999), "999");
        assert_eq!(thousands(1_234_567), "1,234,567");
    }

    #[test]
    fn the_table_has_every_figure() {
        let summary = Summary {
            documents: 40,
            prompt_tokens: 4000,
            reused_tokens: 1000,
            computed_tokens: 3060,
            distinct_tokens: 3000,
            ..Summary::default()
        };
        let table = summary.render();
        for word in ["documents", "4,000", "1,000 (25 %)", "1.020", "peak memory"] {
            assert!(table.contains(word), "{word} is missing in\n{table}");
        }
    }
}
