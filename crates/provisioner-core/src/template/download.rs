//! Fetches a cloud image over HTTP: resumable, hashed while it arrives, never used unless its SHA-512 is the expected one.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha512};
use ureq::http::{Response, StatusCode, header};
use ureq::{Agent, Body, Proxy};

use super::checksum::{Sha512Hex, find_in_sums};
use crate::cancel::Cancel;
use crate::progress::Progress;
use crate::{Error, ErrorKind, Result};

/// Attempts in a row that may bring nothing new before a download is given up.
const FRUITLESS_ATTEMPTS: u32 = 4;
/// A server that says nothing for this long is gone.
const SILENCE: Duration = Duration::from_secs(60);
/// A list of checksums is a few kilobytes.
const SUMS_LIMIT: u64 = 1 << 20;
const CHUNK: usize = 256 << 10;

/// How to reach the server.
#[derive(Debug, Clone, Default)]
pub(super) struct Http {
    /// URL of a proxy, such as `http://proxy:3128`.
    pub proxy: Option<String>,
    /// Wait between attempts; grows with each.
    pub pause: Duration,
}

/// What is known about the bytes of a partial file, so that only a continuation of the same file is appended.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Origin {
    /// The server's strong validator: an ETag, or a Last-Modified date.
    validator: Option<String>,
}

/// How one attempt ended, when it did not end in an error that repeating cannot cure.
enum Attempt {
    /// Nothing is missing; the bytes from this one on have come in this attempt.
    Complete(u64),
    /// Broken off, with the reason; what has arrived is kept.
    Broken(Error),
}

impl Http {
    fn agent(&self) -> Result<Agent> {
        let proxy = match &self.proxy {
            Some(url) => Some(Proxy::new(url).map_err(|error| {
                Error::new(ErrorKind::Invalid, format!("proxy {url:?} cannot be used")).because(error)
            })?),
            None => None,
        };
        Ok(Agent::config_builder()
            .proxy(proxy)
            .http_status_as_error(false)
            .user_agent(concat!("blockhost-build-template/", env!("CARGO_PKG_VERSION")))
            // A compressed transfer has no ranges of the file itself.
            .accept_encoding("identity")
            .timeout_resolve(Some(Duration::from_secs(30)))
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .build()
            .new_agent())
    }

    /// The SHA-512 of the file at `url`, from the `SHA512SUMS` beside it.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] if the list cannot be had, [`ErrorKind::NotFound`] if the file is not in it.
    pub fn checksum_beside(&self, url: &str, cancel: &Cancel) -> Result<Sha512Hex> {
        let (directory, name) = split_url(url)?;
        let sums_url = format!("{directory}/SHA512SUMS");
        let agent = self.agent()?;
        let fetch = {
            let sums_url = sums_url.clone();
            move || -> Result<String> {
                let mut response = call(&agent, &sums_url, &[])?;
                let mut bytes = Vec::new();
                response
                    .body_mut()
                    .as_reader()
                    .take(SUMS_LIMIT + 1)
                    .read_to_end(&mut bytes)
                    .map_err(|error| transfer_failed(&sums_url, error))?;
                if bytes.len() as u64 > SUMS_LIMIT {
                    return Err(Error::new(
                        ErrorKind::Invalid,
                        format!("{sums_url} is too long to be a checksum list"),
                    ));
                }
                String::from_utf8(bytes).map_err(|_| Error::new(ErrorKind::Invalid, format!("{sums_url} is not text")))
            }
        };
        let hint = "the checksum of an image is always verified: give it with --sha512, or retry later";
        let text = in_background(cancel, fetch).map_err(|error| match error.kind {
            ErrorKind::Interrupted => error,
            _ => error.hint(hint),
        })?;
        find_in_sums(&text, name)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("{sums_url} has no SHA-512 for {name}")).hint(hint))
    }

    /// Fetches `url` into a file below `directory` and returns its path; its SHA-512 is `expected`. What an earlier
    /// attempt, or an earlier process, has fetched is continued. The caller removes the file when it is done with it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the server does not have it, [`ErrorKind::Unavailable`] if the transfer does not
    /// get further, [`ErrorKind::Invalid`] if what arrived is not the expected file, [`ErrorKind::Interrupted`].
    pub fn fetch(
        &self,
        url: &str,
        expected: &Sha512Hex,
        directory: &Path,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<PathBuf> {
        fs::create_dir_all(directory).map_err(|error| Error::io("create", directory, error))?;
        let file = directory.join(format!("{}.part", Sha512Hex::of(format!("{url}\n{expected}").as_bytes()).short(32)));
        let agent = self.agent()?;
        let mut fruitless = 0;
        let mut restarted = false;
        loop {
            cancel.check()?;
            let before = length_of(&file);
            let start = match self.attempt(&agent, url, expected, &file, progress, cancel)? {
                Attempt::Complete(start) => start,
                Attempt::Broken(error) => {
                    fruitless = if length_of(&file) > before { 1 } else { fruitless + 1 };
                    if fruitless >= FRUITLESS_ATTEMPTS {
                        return Err(error.hint("what has arrived is kept; the next build continues there"));
                    }
                    progress.note(&format!("{}; continuing", error.message));
                    cancel.sleep(self.pause * fruitless)?;
                    continue;
                }
            };
            let actual = hash_file(&file, cancel)?;
            if actual == *expected {
                return Ok(file);
            }
            forget(&file)?;
            if start == 0 || restarted {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!("{url} has the SHA-512 {}… instead of {}…", actual.short(16), expected.short(16)),
                )
                .hint("the image or its checksum was just replaced, or somebody tampers with it: retry later"));
            }
            // The old part and the new one were not of the same file: once more, from the beginning.
            restarted = true;
            progress.note("the parts do not belong together; fetching the image from the beginning");
        }
    }

    fn attempt(
        &self,
        agent: &Agent,
        url: &str,
        expected: &Sha512Hex,
        file: &Path,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<Attempt> {
        let origin_path = origin_of(file);
        let have = length_of(file);
        let origin: Origin =
            fs::read(&origin_path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        if have > 0 && hash_file(file, cancel)? == *expected {
            return Ok(Attempt::Complete(have));
        }
        let mut headers = Vec::new();
        if have > 0 {
            headers.push((header::RANGE, format!("bytes={have}-")));
            if let Some(validator) = origin.validator {
                headers.push((header::IF_RANGE, validator));
            }
        }
        let (agent, address) = (agent.clone(), url.to_owned());
        let response = match in_background(cancel, move || call(&agent, &address, &headers)) {
            Ok(response) => response,
            Err(error) if error.kind == ErrorKind::Unavailable => return Ok(Attempt::Broken(error)),
            Err(error) => return Err(error),
        };
        let start = match (response.status(), content_range(&response)) {
            (StatusCode::PARTIAL_CONTENT, Some((start, _))) if start == have => have,
            (StatusCode::OK, _) => 0,
            _ => {
                // An answer about another part, or none at all (416): what is here is of no use to this server.
                forget(file)?;
                let message = format!("{url}: the server cannot continue at byte {have}");
                return Ok(Attempt::Broken(Error::new(ErrorKind::Unavailable, message)));
            }
        };
        let total = match content_range(&response) {
            Some((_, total)) if start > 0 => total,
            _ => response.body().content_length().map(|length| start + length),
        };
        let origin = Origin { validator: validator(&response) };
        let text = serde_json::to_vec(&origin).unwrap_or_default();
        fs::write(&origin_path, text).map_err(|error| Error::io("write", &origin_path, error))?;
        let mut out = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(start == 0)
            .open(file)
            .map_err(|error| Error::io("open", file, error))?;
        out.seek(SeekFrom::Start(start)).map_err(|error| Error::io("seek in", file, error))?;

        let chunks = chunks_of(response);
        let mut done = start;
        progress.bytes(done, total);
        loop {
            match next(&chunks, cancel)? {
                Some(Ok(chunk)) => {
                    out.write_all(&chunk).map_err(|error| write_failed(file, error))?;
                    done += chunk.len() as u64;
                    progress.bytes(done, total);
                }
                Some(Err(error)) => return Ok(Attempt::Broken(transfer_failed(url, error))),
                None if total.is_some_and(|total| done < total) => {
                    let message = format!("{url}: the transfer broke off at byte {done}");
                    return Ok(Attempt::Broken(Error::new(ErrorKind::Unavailable, message)));
                }
                None => return Ok(Attempt::Complete(start)),
            }
        }
    }
}

fn write_failed(file: &Path, error: std::io::Error) -> Error {
    let full = error.kind() == std::io::ErrorKind::StorageFull;
    let error = Error::io("write", file, error);
    if full { error.hint("free some space on its filesystem") } else { error }
}

/// Removes a partial file and what is known about it.
///
/// # Errors
/// [`ErrorKind::Io`].
fn forget(file: &Path) -> Result<()> {
    let _ = fs::remove_file(origin_of(file));
    match fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", file, error)),
        _ => Ok(()),
    }
}

fn origin_of(file: &Path) -> PathBuf {
    file.with_extension("origin")
}

fn length_of(file: &Path) -> u64 {
    fs::metadata(file).map_or(0, |meta| meta.len())
}

/// The SHA-512 of a file.
///
/// # Errors
/// [`ErrorKind::Io`], [`ErrorKind::Interrupted`].
pub(super) fn hash_file(path: &Path, cancel: &Cancel) -> Result<Sha512Hex> {
    let mut file = File::open(path).map_err(|error| Error::io("open", path, error))?;
    let mut hash = Sha512::new();
    let mut buffer = vec![0; CHUNK];
    loop {
        cancel.check()?;
        match file.read(&mut buffer).map_err(|error| Error::io("read", path, error))? {
            0 => return Ok(Sha512Hex::from_digest(&hash.finalize())),
            length => hash.update(&buffer[..length]),
        }
    }
}

/// `https://host/a/b.img` into `https://host/a` and `b.img`.
fn split_url(url: &str) -> Result<(&str, &str)> {
    url.split(['?', '#'])
        .next()
        .and_then(|path| path.rsplit_once('/'))
        .filter(|(directory, name)| {
            !name.is_empty() && directory.split("//").nth(1).is_some_and(|host| !host.is_empty())
        })
        .ok_or_else(|| Error::new(ErrorKind::Invalid, format!("{url:?} is not the URL of an image")))
}

/// One request. A status that repeating the request will not change is a final error.
fn call(agent: &Agent, url: &str, headers: &[(header::HeaderName, String)]) -> Result<Response<Body>> {
    let mut request = agent.get(url);
    for (name, value) in headers {
        request = request.header(name, value);
    }
    let response = request.call().map_err(|error| {
        let kind = match error {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => ErrorKind::Invalid,
            _ => ErrorKind::Unavailable,
        };
        Error::new(kind, format!("cannot fetch {url}")).because(error)
    })?;
    let status = response.status();
    let failed = |kind| Err(Error::new(kind, format!("cannot fetch {url}: the server answered {status}")));
    match status.as_u16() {
        200 | 206 | 416 => Ok(response),
        404 | 410 => failed(ErrorKind::NotFound),
        408 | 429 | 500.. => failed(ErrorKind::Unavailable),
        _ => failed(ErrorKind::Invalid),
    }
}

fn transfer_failed(url: &str, error: std::io::Error) -> Error {
    Error::new(ErrorKind::Unavailable, format!("{url}: the transfer broke off")).because(error)
}

/// Start and total of `Content-Range: bytes start-end/total`.
fn content_range(response: &Response<Body>) -> Option<(u64, Option<u64>)> {
    parse_content_range(response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?)
}

fn parse_content_range(value: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (start, _) = range.split_once('-')?;
    Some((start.trim().parse().ok()?, total.trim().parse().ok()))
}

/// What `If-Range` may carry: a strong ETag, else a date.
fn validator(response: &Response<Body>) -> Option<String> {
    let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    text(header::ETAG).filter(|tag| !tag.starts_with("W/")).or_else(|| text(header::LAST_MODIFIED))
}

type Chunks = mpsc::Receiver<std::io::Result<Vec<u8>>>;

/// Reads the body in a thread, so that a stop is noticed while the server is silent.
fn chunks_of(response: Response<Body>) -> Chunks {
    let (send, receive) = mpsc::sync_channel(8);
    thread::spawn(move || {
        let mut reader = response.into_body().into_with_config().limit(u64::MAX).reader();
        loop {
            let mut chunk = vec![0; CHUNK];
            let result = reader.read(&mut chunk).map(|length| {
                chunk.truncate(length);
                chunk
            });
            let last = !matches!(&result, Ok(chunk) if !chunk.is_empty());
            if matches!(&result, Ok(chunk) if chunk.is_empty()) || send.send(result).is_err() || last {
                return;
            }
        }
    });
    receive
}

/// The next item of a background thread; `None` once it has ended.
fn next<T>(items: &mpsc::Receiver<T>, cancel: &Cancel) -> Result<Option<T>> {
    loop {
        cancel.check()?;
        match items.recv_timeout(Duration::from_millis(100)) {
            Ok(item) => return Ok(Some(item)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
        }
    }
}

/// Runs `work`, which has time limits of its own, without making a stop wait for it.
fn in_background<T: Send + 'static>(cancel: &Cancel, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (send, receive) = mpsc::sync_channel(1);
    thread::spawn(move || send.send(work()));
    next(&receive, cancel)?
        .unwrap_or_else(|| Err(Error::new(ErrorKind::Unavailable, "a request over HTTP ended without an answer")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::progress::Silent;
    use std::io::{BufRead, BufReader};
    use std::net::{TcpListener, TcpStream};
    use std::sync::{Arc, Mutex};

    /// What the server of a test does with one request: its headers in lower case, and the connection.
    type Answer = Box<dyn FnMut(&str, &mut TcpStream) + Send>;

    /// A server on loopback that answers each request, one after the other, and records them.
    fn serve(mut answer: Answer) -> (String, Arc<Mutex<Vec<String>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/x/image.qcow2", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let requests = seen.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut request = String::new();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                while reader.read_line(&mut request).unwrap() > 2 {}
                let request = request.to_lowercase();
                requests.lock().unwrap().push(request.clone());
                answer(&request, &mut stream);
            }
        });
        (address, seen)
    }

    fn content() -> Vec<u8> {
        (0..700_000u32).flat_map(|n| n.to_le_bytes()).collect()
    }

    fn range(request: &str) -> usize {
        request
            .lines()
            .find_map(|line| line.strip_prefix("range: bytes="))
            .map_or(0, |value| value.trim().trim_end_matches('-').parse().unwrap())
    }

    fn respond(stream: &mut TcpStream, status: &str, headers: &str, length: usize, body: &[u8]) {
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n");
        let _ = stream.write_all(head.as_bytes());
        let _ = stream.write_all(body);
    }

    /// Serves `content` with ranges, as nginx does; each connection breaks off after `limit` bytes of body.
    fn ranged(content: Vec<u8>, etag: &'static str, limit: usize) -> Answer {
        Box::new(move |request, stream| {
            let same = request.lines().find_map(|line| line.strip_prefix("if-range: ")).is_none_or(|tag| tag == etag);
            let start = if same { range(request) } else { 0 };
            let rest = &content[start..];
            let tags = format!("ETag: {etag}\r\n");
            let sent = &rest[..rest.len().min(limit)];
            if start == 0 {
                respond(stream, "200 OK", &tags, rest.len(), sent);
            } else {
                let tags = format!("{tags}Content-Range: bytes {start}-{}/{}\r\n", content.len() - 1, content.len());
                respond(stream, "206 Partial Content", &tags, rest.len(), sent);
            }
        })
    }

    fn fetch(url: &str, expected: &[u8], dir: &Path) -> Result<PathBuf> {
        Http { proxy: None, pause: Duration::from_millis(1) }.fetch(
            url,
            &Sha512Hex::of(expected),
            dir,
            &Silent,
            &Cancel::default(),
        )
    }

    #[test]
    fn a_transfer_that_breaks_off_is_continued_until_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (url, seen) = serve(ranged(content(), "\"one\"", 1_000_000));
        let file = fetch(&url, &content(), dir.path()).unwrap();
        assert_eq!(fs::read(file).unwrap(), content());
        let seen = seen.lock().unwrap();
        assert_eq!(seen.len(), 3);
        assert!(seen[1].contains("range: bytes=1000000-"), "{}", seen[1]);
        assert!(seen[1].contains("if-range: \"one\""), "{}", seen[1]);
    }

    #[test]
    fn a_later_process_continues_where_the_first_was_killed() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = true;
        let (url, seen) = serve({
            let mut good = ranged(content(), "\"one\"", usize::MAX);
            Box::new(move |request, stream| {
                if std::mem::take(&mut first) {
                    respond(stream, "200 OK", "ETag: \"one\"\r\n", content().len(), &content()[..500_000]);
                } else {
                    good(request, stream);
                }
            })
        });
        let http = Http { proxy: None, pause: Duration::from_secs(600) };
        let cancel = Cancel::default();
        let canceller = thread::spawn({
            let cancel = cancel.clone();
            let part = dir.path().to_owned();
            move || {
                let arrived = || fs::read_dir(&part).unwrap().flatten().any(|e| e.metadata().unwrap().len() == 500_000);
                while !arrived() {
                    thread::sleep(Duration::from_millis(5));
                }
                cancel.cancel();
            }
        });
        let error = http.fetch(&url, &Sha512Hex::of(&content()), dir.path(), &Silent, &cancel).unwrap_err();
        canceller.join().unwrap();
        assert_eq!(error.kind, ErrorKind::Interrupted);
        fetch(&url, &content(), dir.path()).unwrap();
        assert_eq!(range(&seen.lock().unwrap()[1]), 500_000);
        // And a third one finds it complete and asks nobody.
        fetch(&url, &content(), dir.path()).unwrap();
        assert_eq!(seen.lock().unwrap().len(), 2);
    }

    /// Leaves a part of another version of the file behind, as an interrupted earlier build would.
    fn leave_part(url: &str, expected: &[u8], dir: &Path, bytes: &[u8], validator: Option<&str>) {
        let key = Sha512Hex::of(format!("{url}\n{}", Sha512Hex::of(expected)).as_bytes());
        let part = dir.join(format!("{}.part", key.short(32)));
        fs::write(&part, bytes).unwrap();
        let origin = Origin { validator: validator.map(str::to_owned) };
        fs::write(origin_of(&part), serde_json::to_vec(&origin).unwrap()).unwrap();
    }

    #[test]
    fn a_changed_etag_or_a_server_without_ranges_starts_over() {
        let dir = tempfile::tempdir().unwrap();
        let (url, _) = serve(ranged(content(), "\"two\"", usize::MAX));
        leave_part(&url, &content(), dir.path(), b"of the old version", Some("\"one\""));
        assert_eq!(fs::read(fetch(&url, &content(), dir.path()).unwrap()).unwrap(), content());

        let (url, _) = serve(Box::new(|_, stream| respond(stream, "200 OK", "", content().len(), &content())));
        leave_part(&url, &content(), dir.path(), b"of the old version", None);
        assert_eq!(fs::read(fetch(&url, &content(), dir.path()).unwrap()).unwrap(), content());
    }

    #[test]
    fn what_was_sent_anew_as_a_whole_is_not_fetched_a_second_time() {
        let dir = tempfile::tempdir().unwrap();
        let (url, seen) = serve(ranged(content(), "\"two\"", usize::MAX));
        leave_part(&url, b"the old version", dir.path(), b"the old", Some("\"one\""));
        let error = fetch(&url, b"the old version", dir.path()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Invalid);
        assert_eq!(seen.lock().unwrap().len(), 1);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn parts_that_do_not_belong_together_are_thrown_away_once() {
        let dir = tempfile::tempdir().unwrap();
        // No validator: the server continues a part that is not its own.
        let (url, seen) = serve(ranged(content(), "\"two\"", usize::MAX));
        leave_part(&url, &content(), dir.path(), b"of another file", None);
        assert_eq!(fs::read(fetch(&url, &content(), dir.path()).unwrap()).unwrap(), content());
        assert_eq!(seen.lock().unwrap().len(), 2);
    }

    #[test]
    fn a_part_longer_than_the_file_is_thrown_away() {
        let dir = tempfile::tempdir().unwrap();
        let (url, _) = serve(Box::new(|request, stream| match range(request) {
            0 => respond(stream, "200 OK", "", content().len(), &content()),
            _ => respond(stream, "416 Range Not Satisfiable", "", 0, b""),
        }));
        leave_part(&url, &content(), dir.path(), b"whatever", None);
        assert_eq!(fs::read(fetch(&url, &content(), dir.path()).unwrap()).unwrap(), content());
    }

    #[test]
    fn a_wrong_checksum_is_refused_and_nothing_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (url, seen) = serve(ranged(content(), "\"one\"", usize::MAX));
        let error = fetch(&url, b"something else", dir.path()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Invalid);
        assert!(error.message.contains("has the SHA-512"), "{}", error.message);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(seen.lock().unwrap().len(), 1);
    }

    #[test]
    fn a_missing_file_is_not_asked_for_twice_and_a_broken_server_not_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let (url, seen) = serve(Box::new(|_, stream| respond(stream, "404 Not Found", "", 0, b"")));
        assert_eq!(fetch(&url, b"", dir.path()).unwrap_err().kind, ErrorKind::NotFound);
        assert_eq!(seen.lock().unwrap().len(), 1);
        let (url, seen) = serve(Box::new(|_, stream| respond(stream, "503 Busy", "", 0, b"")));
        assert_eq!(fetch(&url, b"", dir.path()).unwrap_err().kind, ErrorKind::Unavailable);
        assert_eq!(seen.lock().unwrap().len(), FRUITLESS_ATTEMPTS as usize);
    }

    #[test]
    fn the_checksum_comes_from_beside_the_image_or_not_at_all() {
        let sums = format!("{}  other.qcow2\n{}  image.qcow2\n", Sha512Hex::of(b"o"), Sha512Hex::of(b"i"));
        let (url, seen) = serve(Box::new(move |_, stream| respond(stream, "200 OK", "", sums.len(), sums.as_bytes())));
        let http = Http::default();
        let cancel = Cancel::default();
        assert_eq!(http.checksum_beside(&url, &cancel).unwrap(), Sha512Hex::of(b"i"));
        assert!(seen.lock().unwrap()[0].starts_with("get /x/sha512sums "));
        let error = http.checksum_beside(&url.replace("image", "missing"), &cancel).unwrap_err();
        assert_eq!(error.kind, ErrorKind::NotFound);
        let (url, _) = serve(Box::new(|_, stream| respond(stream, "404 Not Found", "", 0, b"")));
        let error = http.checksum_beside(&url, &cancel).unwrap_err();
        assert!(error.hint.unwrap().contains("--sha512"));
    }

    #[test]
    fn content_ranges_and_urls_are_taken_apart() {
        assert_eq!(parse_content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(parse_content_range("bytes 5-9/*"), Some((5, None)));
        assert_eq!(parse_content_range("bytes */10"), None);
        assert_eq!(split_url("https://h/a/b.img?x=/y").unwrap(), ("https://h/a", "b.img"));
        assert!(split_url("https://").is_err());
        assert!(split_url("https://h/").is_err());
    }
}
