//! Stands between a client and a broker, and cuts the wire or swallows what is on it when a test says so.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

const OPEN: u8 = 0;
const CUT: u8 = 1;
const SILENT: u8 = 2;
/// How soon a silent wire notices that it is healed.
const SILENCE: Duration = Duration::from_millis(5);

/// A TCP proxy on loopback.
pub struct Proxy {
    state: Arc<AtomicU8>,
    connections: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    /// Listens on one port and leads to another.
    pub fn start((port, target): (u16, u16)) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("the script has left the port free");
        let (state, connections) = (Arc::new(AtomicU8::new(OPEN)), Arc::default());
        let proxy = Self { state: Arc::clone(&state), connections: Arc::clone(&connections) };
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if state.load(Ordering::Acquire) == CUT {
                    continue;
                }
                let target = SocketAddr::from(([127, 0, 0, 1], target));
                let Ok(server) = TcpStream::connect_timeout(&target, Duration::from_secs(1)) else {
                    continue;
                };
                pass(&client, &server, &state);
                pass(&server, &client, &state);
                connections.lock().unwrap_or_else(PoisonError::into_inner).extend([client, server]);
            }
        });
        proxy
    }

    /// Ends all connections, and takes no new ones.
    pub fn cut(&self) {
        self.state.store(CUT, Ordering::Release);
        for connection in self.connections.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// Keeps all connections and takes new ones, and nothing comes through: no side is told that the other is away.
    pub fn swallow(&self) {
        self.state.store(SILENT, Ordering::Release);
    }

    /// What a silent wire has held is delivered late.
    pub fn heal(&self) {
        self.state.store(OPEN, Ordering::Release);
    }
}

fn pass(from: &TcpStream, to: &TcpStream, state: &Arc<AtomicU8>) {
    let (mut from, mut to) = (from.try_clone().expect("a handle"), to.try_clone().expect("a handle"));
    let state = Arc::clone(state);
    std::thread::spawn(move || {
        let mut bytes = [0; 16 << 10];
        while let Ok(len @ 1..) = from.read(&mut bytes) {
            while state.load(Ordering::Acquire) == SILENT {
                std::thread::sleep(SILENCE);
            }
            // What is under way when the wire is cut is lost.
            if state.load(Ordering::Acquire) == CUT || to.write_all(&bytes[..len]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
    });
}
