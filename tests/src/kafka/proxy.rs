//! Stands between a client and a broker, and cuts the wire when a test says so.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A TCP proxy on loopback.
pub struct Proxy {
    is_cut: Arc<AtomicBool>,
    connections: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    /// Listens on one port and leads to another.
    pub fn start((port, target): (u16, u16)) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("the script has left the port free");
        let (is_cut, connections) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let proxy = Self { is_cut: Arc::clone(&is_cut), connections: Arc::clone(&connections) };
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if is_cut.load(Ordering::Acquire) {
                    continue;
                }
                let target = SocketAddr::from(([127, 0, 0, 1], target));
                let Ok(server) = TcpStream::connect_timeout(&target, Duration::from_secs(1)) else {
                    continue;
                };
                pass(&client, &server, &is_cut);
                pass(&server, &client, &is_cut);
                connections.lock().unwrap_or_else(PoisonError::into_inner).extend([client, server]);
            }
        });
        proxy
    }

    /// Ends all connections, and takes no new ones.
    pub fn cut(&self) {
        self.is_cut.store(true, Ordering::Release);
        for connection in self.connections.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    pub fn heal(&self) {
        self.is_cut.store(false, Ordering::Release);
    }
}

fn pass(from: &TcpStream, to: &TcpStream, is_cut: &Arc<AtomicBool>) {
    let (mut from, mut to) = (from.try_clone().expect("a handle"), to.try_clone().expect("a handle"));
    let is_cut = Arc::clone(is_cut);
    std::thread::spawn(move || {
        let mut bytes = [0; 16 << 10];
        while let Ok(len @ 1..) = from.read(&mut bytes) {
            // What is under way when the wire is cut is lost.
            if is_cut.load(Ordering::Acquire) || to.write_all(&bytes[..len]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
    });
}
