//! A server that hands each request to a closure, over plain HTTP/1.1.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// What was asked for.
#[derive(Debug, Clone)]
pub struct WebRequest {
    /// `GET` and the like.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// By lower-case name.
    headers: Vec<(String, String)>,
}

impl WebRequest {
    /// The value of a header, by its lower-case name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// An answer.
#[derive(Debug, Clone, Default)]
pub struct WebAnswer {
    /// HTTP status.
    pub status: u16,
    /// All headers but the length.
    pub headers: Vec<(&'static str, String)>,
    /// What is sent, unless the method is HEAD.
    pub body: Vec<u8>,
    /// The length that is stated, if not the body's.
    pub length: Option<usize>,
}

/// A server on loopback, gone when dropped.
pub struct WebServer {
    /// `127.0.0.1:PORT`
    pub address: String,
    requests: Arc<Mutex<Vec<WebRequest>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl WebServer {
    /// Answers every request by what `answer` says.
    pub fn start(answer: impl Fn(&WebRequest) -> WebAnswer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind a loopback port");
        let address = listener.local_addr().expect("address of a bound socket").to_string();
        let requests = Arc::<Mutex<Vec<WebRequest>>>::default();
        let stop = Arc::new(AtomicBool::new(false));
        let (seen, stopped, answer) = (requests.clone(), stop.clone(), Arc::new(answer));
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let Ok(stream) = stream else { continue };
                let (seen, answer) = (seen.clone(), answer.clone());
                std::thread::spawn(move || serve(stream, &seen, &*answer));
            }
        });
        Self { address, requests, stop, thread: Some(thread) }
    }

    /// The requests that came since this was asked last.
    pub fn requests(&self) -> Vec<WebRequest> {
        std::mem::take(&mut self.requests.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn serve(stream: TcpStream, seen: &Mutex<Vec<WebRequest>>, answer: &dyn Fn(&WebRequest) -> WebAnswer) {
    let Ok(mut out) = stream.try_clone() else { return };
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    while let Some(first) = lines.next() {
        let mut headers = Vec::new();
        for line in lines.by_ref().take_while(|line| !line.is_empty()) {
            let (name, value) = line.split_once(':').unwrap_or((&line, ""));
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let mut words = first.split_whitespace().map(str::to_owned);
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let request = WebRequest { method, path, headers };
        seen.lock().unwrap_or_else(PoisonError::into_inner).push(request.clone());
        let WebAnswer { status, headers, body, length } = answer(&request);
        let mut head = format!("HTTP/1.1 {status} Answer\r\n");
        for (name, value) in &headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str(&format!("content-length: {}\r\n\r\n", length.unwrap_or(body.len())));
        let bodiless = request.method == "HEAD" || status == 304;
        let body: &[u8] = if bodiless { &[] } else { &body };
        let sent = out.write_all(head.as_bytes()).and_then(|()| out.write_all(body));
        if sent.is_err() || (length.is_some() && !bodiless) {
            return;
        }
    }
}

impl Drop for WebServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(&self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
