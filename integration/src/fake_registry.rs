//! A registry that misbehaves: it hands each request to a closure, over plain HTTP/1.1.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

/// Status, content type and body of an answer.
pub type Answer = (u16, &'static str, Vec<u8>);

/// A server on loopback, gone when dropped.
pub struct FakeRegistry {
    /// `127.0.0.1:PORT`
    pub address: String,
    requests: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl FakeRegistry {
    /// Answers every request by what `answer` says of its method and path.
    pub fn start(answer: impl Fn(&str, &str) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind a loopback port");
        let address = listener.local_addr().expect("address of a bound socket").to_string();
        let requests = Arc::new(AtomicUsize::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let (count, stopped, answer) = (requests.clone(), stop.clone(), Arc::new(answer));
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let Ok(stream) = stream else { continue };
                let (count, answer) = (count.clone(), answer.clone());
                std::thread::spawn(move || serve(stream, &count, &*answer));
            }
        });
        Self { address, requests, stop, thread: Some(thread) }
    }

    /// How many requests came.
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }
}

fn serve(stream: TcpStream, count: &AtomicUsize, answer: &dyn Fn(&str, &str) -> Answer) {
    let Ok(mut out) = stream.try_clone() else { return };
    let mut reader = BufReader::new(stream);
    loop {
        let mut first = String::new();
        if !matches!(reader.read_line(&mut first), Ok(n) if n > 0) {
            return;
        }
        loop {
            let mut header = String::new();
            if !matches!(reader.read_line(&mut header), Ok(n) if n > 0) {
                return;
            }
            if header.trim().is_empty() {
                break;
            }
        }
        count.fetch_add(1, Ordering::Relaxed);
        let mut words = first.split_whitespace();
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let (status, kind, body) = answer(method, path);
        let head = format!(
            "HTTP/1.1 {status} Answer\r\ncontent-type: {kind}\r\ncontent-length: {}\r\ndocker-distribution-api-version: registry/2.0\r\n\r\n",
            body.len()
        );
        let body: &[u8] = if method == "HEAD" { &[] } else { &body };
        if out.write_all(head.as_bytes()).and_then(|()| out.write_all(body)).is_err() {
            return;
        }
    }
}

impl Drop for FakeRegistry {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(&self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
