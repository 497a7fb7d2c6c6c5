//! The `tidemill` command: parses, runs, and shows errors with their place and a hint.
#![forbid(unsafe_code)]

use std::io::{IsTerminal, stderr};

use clap::Parser;
use miette::{Diagnostic, GraphicalReportHandler, GraphicalTheme, NamedSource, SourceCode, SourceSpan};
use tidemill::cli::{Cli, CliError, execute};
use tracing_subscriber::EnvFilter;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    let filter = EnvFilter::try_from_env("TIDEMILL_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        .init();
    if let Err(error) = execute(Cli::parse()) {
        let code = error.exit_code();
        show(&Report::new(error));
        std::process::exit(code);
    }
}

/// An error as miette shows it.
#[derive(Debug)]
struct Report {
    error: CliError,
    source: Option<(NamedSource<String>, SourceSpan)>,
}

impl Report {
    fn new(error: CliError) -> Self {
        let source = match &error {
            CliError::Spec(spec) if !spec.text.is_empty() => {
                let source = NamedSource::new(&spec.path, spec.text.clone()).with_language("YAML");
                Some((source, spec.span.clone().into()))
            }
            _ => None,
        };
        Self { error, source }
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.error {
            // The snippet names the place.
            CliError::Spec(spec) if self.source.is_some() => f.write_str(&spec.message),
            CliError::Spec(spec) => write!(f, "{}: {}", spec.path, spec.message),
            error => std::fmt::Display::fmt(error, f),
        }
    }
}

impl std::error::Error for Report {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl Diagnostic for Report {
    fn help(&self) -> Option<Box<dyn std::fmt::Display + '_>> {
        self.error.help().map(|help| Box::new(help) as _)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.source.as_ref().map(|(source, _)| source as _)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = miette::LabeledSpan> + '_>> {
        let (_, span) = self.source.as_ref()?;
        let CliError::Spec(spec) = &self.error else { return None };
        let label = if spec.key.is_empty() { "here".to_owned() } else { spec.key.clone() };
        Some(Box::new(std::iter::once(miette::LabeledSpan::new_with_span(Some(label), *span))))
    }
}

fn show(report: &Report) {
    let theme =
        if stderr().is_terminal() { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
    let mut text = String::new();
    match GraphicalReportHandler::new_themed(theme).render_report(&mut text, report) {
        Ok(()) => eprintln!("{text}"),
        Err(_) => eprintln!("error: {report}"),
    }
}
