//! A web server on loopback for one test: files with their ETag, ranges as web servers answer them, and its own kinds of trouble.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

pub struct File {
    pub body: Arc<Vec<u8>>,
    /// Without one, ranges are answered whatever `If-Range` says.
    pub etag: Option<&'static str>,
}

#[derive(Default)]
pub struct Site {
    pub files: HashMap<String, File>,
    /// From one path to another.
    pub redirects: HashMap<String, String>,
    /// Each answer's body ends after so many bytes, with the connection.
    pub cut: Option<usize>,
    /// Each answer's body stops after so many bytes, and the connection stays open.
    pub stall: Option<usize>,
    /// Requests so far: path, and the first byte of the range asked for.
    pub requests: Vec<(String, usize)>,
}

#[derive(Clone)]
pub struct Server {
    pub url: String,
    site: Arc<Mutex<Site>>,
}

impl Server {
    pub fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server =
            Self { url: format!("http://{}", listener.local_addr().unwrap()), site: Arc::new(Mutex::default()) };
        let own = server.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, server) = (stream.unwrap(), own.clone());
                thread::spawn(move || server.answer(stream));
            }
        });
        server
    }

    pub fn change<T>(&self, change: impl FnOnce(&mut Site) -> T) -> T {
        change(&mut self.site.lock().unwrap())
    }

    pub fn put(&self, path: &str, body: &Arc<Vec<u8>>, etag: Option<&'static str>) {
        self.change(|site| site.files.insert(path.to_owned(), File { body: body.clone(), etag }));
    }

    /// The requests since the last time.
    pub fn requests(&self) -> Vec<(String, usize)> {
        self.change(|site| std::mem::take(&mut site.requests))
    }

    fn answer(&self, mut stream: TcpStream) {
        let mut request = String::new();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        while reader.read_line(&mut request).unwrap_or(0) > 2 {}
        let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
        let header = |name: &str| {
            let lines = request.lines().filter_map(|line| line.split_once(": "));
            lines.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned()).next()
        };
        let range = header("range").map(|value| value.trim_start_matches("bytes=").trim_end_matches('-').to_owned());
        let start: usize = range.map_or(0, |value| value.parse().unwrap());
        let (head, body, stall) = self.change(|site| {
            site.requests.push((path.clone(), start));
            if let Some(to) = site.redirects.get(&path) {
                return (format!("302 Found\r\nLocation: {to}\r\nContent-Length: 0"), Vec::new(), false);
            }
            let Some(file) = site.files.get(&path) else {
                return ("404 Not Found\r\nContent-Length: 0".to_owned(), Vec::new(), false);
            };
            let changed = file.etag.is_some() && header("if-range").is_some_and(|tag| Some(&*tag) != file.etag);
            let start = if changed { 0 } else { start };
            let length = file.body.len();
            if start > length {
                return ("416 Range Not Satisfiable\r\nContent-Length: 0".to_owned(), Vec::new(), false);
            }
            let status = match start {
                0 => "200 OK".to_owned(),
                _ => format!("206 Partial Content\r\nContent-Range: bytes {start}-{}/{length}", length - 1),
            };
            let tag = file.etag.map(|tag| format!("\r\nETag: {tag}")).unwrap_or_default();
            let rest = &file.body[start..];
            let shown = rest.len().min(site.cut.or(site.stall).unwrap_or(usize::MAX));
            (format!("{status}\r\nContent-Length: {}{tag}", rest.len()), rest[..shown].to_vec(), site.stall.is_some())
        });
        let _ = stream.write_all(format!("HTTP/1.1 {head}\r\nConnection: close\r\n\r\n").as_bytes());
        let _ = stream.write_all(&body);
        if stall {
            // Until the other side is gone.
            let _ = reader.read_line(&mut String::new());
        }
    }
}
