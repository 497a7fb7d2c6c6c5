//! Progress on standard error: a bar on a terminal, a plain line now and then elsewhere.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tidemill_operators::counters::Counters;

use crate::clock::Clock;
use crate::summary::{share, thousands};

const BAR_INTERVAL: Duration = Duration::from_millis(200);
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Reports until dropped.
pub struct Progress {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    /// Starts reporting; `total` documents are expected, if it is known. With a name, one of several reports: plain
    /// lines that begin with it.
    pub fn start(
        name: Option<String>,
        counters: Arc<Counters>,
        total: Option<u64>,
        clock: Clock,
    ) -> std::io::Result<Self> {
        let (stop, stopped) = channel();
        let on_terminal = std::io::stderr().is_terminal() && name.is_none();
        let name = name.map(|name| format!("{name}: ")).unwrap_or_default();
        let interval = if on_terminal { BAR_INTERVAL } else { LINE_INTERVAL };
        let thread = std::thread::Builder::new().name("progress".to_owned()).spawn(move || {
            let bar = on_terminal.then(|| bar(total));
            let begun = clock.elapsed();
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(interval) {
                let seconds = (clock.elapsed() - begun).as_secs_f64();
                let done = Counters::get(&counters.arrived);
                let line = line(&counters, seconds, done, total);
                match &bar {
                    Some(bar) => {
                        bar.set_position(done);
                        bar.set_message(line);
                    }
                    None => eprintln!("{name}{} documents  {line}", of_total(done, total)),
                }
            }
            if let Some(bar) = bar {
                bar.finish_and_clear();
            }
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the progress line is no reason to fail a run.
            let _ = thread.join();
        }
    }
}

fn bar(total: Option<u64>) -> ProgressBar {
    let style = if total.is_some() {
        "{bar:30} {pos}/{len} documents  {msg}"
    } else {
        "{spinner} {pos} documents  {msg}"
    };
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template(style).expect("a template of our own"));
    bar
}

fn of_total(done: u64, total: Option<u64>) -> String {
    match total {
        Some(total) => format!("{}/{}", thousands(done), thousands(total)),
        None => thousands(done),
    }
}

fn line(counters: &Counters, seconds: f64, done: u64, total: Option<u64>) -> String {
    let prompt = Counters::get(&counters.prompt_tokens);
    let output = Counters::get(&counters.output_tokens);
    let reused = share(Counters::get(&counters.reused_tokens), prompt);
    let rate = |tokens: u64| tokens as f64 / seconds.max(0.001);
    let eta = match total {
        Some(total) if done > 0 && total >= done => {
            format!("  ETA {:.0} s", seconds * (total - done) as f64 / done as f64)
        }
        _ => String::new(),
    };
    format!(
        "prompt {:.0} tok/s  output {:.0} tok/s  prefix hits {reused:.0} %{eta}",
        rate(prompt),
        rate(output)
    )
}
