//! Serves what is seen over HTTP: `/metrics` for Prometheus, `/healthz` and `/readyz` for whoever restarts processes,
//! `/snapshot` for the live view.
//!
//! One thread with a runtime of its own. Nothing is changed by a request, and nothing of the data is shown.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::sync::Notify;

use super::metrics::encode;
use super::{Registry, Snapshot};

/// Serves until dropped.
pub struct Server {
    stop: Arc<Notify>,
    thread: Option<JoinHandle<()>>,
    pub address: SocketAddr,
}

impl Server {
    /// Takes the address at once, so that a used one is an error before anything runs.
    pub fn start(address: SocketAddr, registry: Registry) -> std::io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let stop = Arc::new(Notify::new());
        let stopped = Arc::clone(&stop);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let thread = std::thread::Builder::new().name("observe".to_owned()).spawn(move || {
            let served = runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                let wait = async move { stopped.notified().await };
                axum::serve(listener, routes(registry)).with_graceful_shutdown(wait).await
            });
            if let Err(error) = served {
                tracing::warn!(%error, "metrics are not served any more");
            }
        })?;
        Ok(Self { stop, thread: Some(thread), address })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.notify_one();
        // Whoever keeps a connection open must not keep the process.
        drop(self.thread.take());
    }
}

fn routes(registry: Registry) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/snapshot", get(snapshot))
        .route("/healthz", get(healthy))
        .route("/readyz", get(ready))
        .with_state(registry)
}

async fn metrics(State(registry): State<Registry>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], encode(registry.snapshot())).into_response()
}

async fn snapshot(State(registry): State<Registry>) -> Response {
    let text = serde_json::to_string(&registry.snapshot()).expect("plain data");
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}

/// A process of which a pipeline has failed should be started again.
async fn healthy(State(registry): State<Registry>) -> Response {
    let failed: Vec<String> = registry
        .snapshot()
        .pipelines
        .into_iter()
        .filter_map(|pipeline| Some(format!("{}: {}", pipeline.name, pipeline.failed?)))
        .collect();
    match failed.is_empty() {
        true => (StatusCode::OK, "ok\n".to_owned()).into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, failed.join("\n") + "\n").into_response(),
    }
}

/// Ready is who has its model and its partitions.
async fn ready(State(registry): State<Registry>) -> Response {
    let Snapshot { pipelines } = registry.snapshot();
    let waits = pipelines.iter().find(|one| one.kafka.as_ref().is_some_and(|kafka| kafka.awaits_partitions));
    match (pipelines.is_empty(), waits) {
        (true, _) => (StatusCode::SERVICE_UNAVAILABLE, "loading the model\n".to_owned()).into_response(),
        (false, Some(pipeline)) => {
            let message = format!("{} waits for its partitions\n", pipeline.name);
            (StatusCode::SERVICE_UNAVAILABLE, message).into_response()
        }
        (false, None) => (StatusCode::OK, "ok\n".to_owned()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(address: SocketAddr, path: &str) -> (u16, String) {
        let agent =
            ureq::Agent::new_with_config(ureq::config::Config::builder().http_status_as_error(false).build());
        let mut response = agent.get(format!("http://{address}{path}")).call().unwrap();
        (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
    }

    #[test]
    fn answers_and_says_that_an_address_is_taken() {
        let server = Server::start(([127, 0, 0, 1], 0).into(), Registry::default()).unwrap();
        assert_eq!(get(server.address, "/healthz"), (200, "ok\n".to_owned()));
        assert_eq!(get(server.address, "/readyz"), (503, "loading the model\n".to_owned()));
        assert_eq!(get(server.address, "/snapshot"), (200, "{\"pipelines\":[]}".to_owned()));
        assert!(get(server.address, "/metrics").1.ends_with("# EOF\n"));
        assert!(Server::start(server.address, Registry::default()).is_err());
    }
}
