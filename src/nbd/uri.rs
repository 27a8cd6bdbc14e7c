//! NBD URIs: `nbd://HOST[:PORT]/NAME`, `nbd+unix:///NAME?socket=PATH`, and both with `nbds`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The port that is registered for the protocol.
pub const DEFAULT_PORT: u16 = 10809;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A host, by name or number, and a port.
    Tcp {
        /// The host; an IPv6 address without brackets.
        host: String,
        /// The port.
        port: u16,
    },
}

/// Whether a connection is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Security {
    /// Plain.
    #[default]
    Plain,
    /// TLS.
    Tls,
}

/// What the URI says about certificates.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TlsQuery {
    /// Directory of `ca-cert.pem`, `client-cert.pem` and `client-key.pem`.
    pub certificates: Option<PathBuf>,
    /// The name that the server's certificate must have, where it is not that of the host.
    pub hostname: Option<String>,
}

/// An NBD URI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uri {
    /// Where the server is.
    pub address: Address,
    /// Whether TLS is used.
    pub security: Security,
    /// The export's name; may be empty.
    pub export: String,
    /// How TLS is set up.
    pub tls: TlsQuery,
}

const SCHEMES: [(&str, Security, bool); 6] = [
    ("nbd://", Security::Plain, false),
    ("nbds://", Security::Tls, false),
    ("nbd+unix://", Security::Plain, true),
    ("nbds+unix://", Security::Tls, true),
    ("nbd+vsock://", Security::Plain, false),
    ("nbds+vsock://", Security::Tls, false),
];

/// Whether a name on the command line is meant as a URI and not as a file.
pub fn is_uri(name: &Path) -> bool {
    let name = name.to_string_lossy();
    SCHEMES.iter().any(|(scheme, ..)| name.starts_with(scheme))
}

impl Uri {
    /// Takes a URI apart.
    ///
    /// # Errors
    /// `Invalid`, saying what is wrong; `Unsupported` for what vdtool does not speak.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |why: &str| {
            let allowed = "allowed: nbd://HOST[:PORT]/NAME, nbd+unix:///NAME?socket=PATH, and \
                           both with nbds for TLS";
            Error::invalid(format!("{why} ({allowed})")).at(text)
        };
        let found = SCHEMES.iter().find(|(scheme, ..)| text.starts_with(scheme));
        let (scheme, security, unix) = found.ok_or_else(|| wrong("is not an NBD URI"))?;
        if scheme.contains("vsock") {
            return Err(Error::unsupported("vsock is not supported").at(text));
        }
        let rest = &text[scheme.len()..];
        let rest = rest.split_once('#').map_or(rest, |(before, _)| before);
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
        let query = Query::parse(query).map_err(|why| wrong(&why))?;
        let address = match (unix, query.socket) {
            (true, Some(_)) if !authority.is_empty() => {
                return Err(wrong("names a host besides a Unix socket"));
            }
            (true, Some(socket)) => Address::Unix(socket),
            (true, None) => return Err(wrong("names no socket (?socket=PATH)")),
            (false, Some(_)) => return Err(wrong("names a socket, but its scheme is for TCP")),
            (false, None) => tcp(authority).map_err(|why| wrong(&why))?,
        };
        Ok(Self {
            address,
            security: *security,
            export: decode(export).map_err(|why| wrong(&why))?,
            tls: query.tls,
        })
    }

    /// The URI of an export at an address, as [`Uri::parse`] reads it.
    pub fn of(address: &Address, security: Security, export: &str) -> String {
        let scheme = match security {
            Security::Plain => "nbd",
            Security::Tls => "nbds",
        };
        match address {
            Address::Unix(path) => format!(
                "{scheme}+unix:///{}?socket={}",
                encode(export.as_bytes()),
                encode(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()))
            ),
            Address::Tcp { host, port } => {
                let host = match host.contains(':') {
                    true => format!("[{host}]"),
                    false => host.clone(),
                };
                let export = encode(export.as_bytes());
                match *port {
                    DEFAULT_PORT => format!("{scheme}://{host}/{export}"),
                    port => format!("{scheme}://{host}:{port}/{export}"),
                }
            }
        }
    }
}

#[derive(Default)]
struct Query {
    socket: Option<PathBuf>,
    tls: TlsQuery,
}

impl Query {
    fn parse(text: &str) -> std::result::Result<Self, String> {
        let mut query = Self::default();
        for pair in text.split(['&', ';']).filter(|p| !p.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decode(value)?;
            match key {
                "socket" if !value.is_empty() => query.socket = Some(value.into()),
                "tls-certificates" => query.tls.certificates = Some(value.into()),
                "tls-hostname" => query.tls.hostname = Some(value),
                _ => {
                    return Err(format!(
                        "its parameter '{}' is unknown (known: socket, tls-certificates, \
                         tls-hostname)",
                        crate::util::text::printable(pair)
                    ));
                }
            }
        }
        Ok(query)
    }
}

/// `HOST[:PORT]`, where an IPv6 address stands in brackets.
///
/// # Errors
/// Says what is wrong with it.
pub fn tcp(authority: &str) -> std::result::Result<Address, String> {
    if authority.contains('@') {
        return Err("names a user, which the protocol does not have".to_owned());
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest
                .split_once(']')
                .ok_or_else(|| "its IPv6 address has no end".to_owned())?;
            match after {
                "" => (host, None),
                after => (host, Some(after.strip_prefix(':').unwrap_or(after))),
            }
        }
        None => match authority.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    if host.is_empty() {
        return Err("names no host".to_owned());
    }
    let port = match port {
        None | Some("") => DEFAULT_PORT,
        Some(port) => port
            .parse()
            .map_err(|_| format!("'{port}' is no port (allowed: 0 to 65535)"))?,
    };
    let host = decode(host)?;
    Ok(Address::Tcp { host, port })
}

fn decode(text: &str) -> std::result::Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|b| char::from(b).to_digit(16));
        match (digit(), digit()) {
            (Some(high), Some(low)) => bytes.push(u8::try_from(high * 16 + low).unwrap_or(0)),
            _ => return Err("has a % without two hexadecimal digits".to_owned()),
        }
    }
    match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err("is not UTF-8 without zero bytes".to_owned()),
    }
}

fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                text.push(char::from(byte));
            }
            _ => {
                let _ = write!(text, "%{byte:02X}");
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp_at(host: &str, port: u16) -> Address {
        Address::Tcp {
            host: host.to_owned(),
            port,
        }
    }

    #[test]
    fn uris_name_an_address_and_an_export() {
        let cases = [
            ("nbd://localhost", tcp_at("localhost", 10809), ""),
            ("nbd://localhost/", tcp_at("localhost", 10809), ""),
            ("nbd://a.b:99/x/y", tcp_at("a.b", 99), "x/y"),
            ("nbd://[::1]:99/a%20b", tcp_at("::1", 99), "a b"),
            ("nbd://[::1]/", tcp_at("::1", 10809), ""),
            (
                "nbd+unix:///?socket=/tmp/s",
                Address::Unix("/tmp/s".into()),
                "",
            ),
            (
                "nbd+unix:///e?socket=a%26b",
                Address::Unix("a&b".into()),
                "e",
            ),
            ("nbd+unix://?socket=s", Address::Unix("s".into()), ""),
        ];
        for (text, address, export) in cases {
            let uri = Uri::parse(text).expect(text);
            assert_eq!((uri.address, &*uri.export), (address, export), "{text}");
            assert_eq!(uri.security, Security::Plain);
        }
        let uri = Uri::parse("nbds://h/e?tls-certificates=/c&tls-hostname=n").expect("right");
        assert_eq!(uri.security, Security::Tls);
        assert_eq!(uri.tls.certificates.as_deref(), Some(Path::new("/c")));
        assert_eq!(uri.tls.hostname.as_deref(), Some("n"));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for text in [
            "http://a/",
            "nbd:///",
            "nbd://:99/",
            "nbd://a:x/",
            "nbd://a:70000/",
            "nbd://[::1/",
            "nbd://u@h/",
            "nbd://h/%",
            "nbd://h/%f",
            "nbd://h/%00",
            "nbd://h/%ff",
            "nbd://h/?socket=/tmp/s",
            "nbd+unix:///e",
            "nbd+unix://h/e?socket=/s",
            "nbd://h/?tls-psk-file=x",
            "nbd+vsock://2/",
        ] {
            Uri::parse(text).expect_err(text);
        }
    }

    #[test]
    fn an_address_makes_a_uri_that_leads_there() {
        for (address, export) in [
            (tcp_at("::1", 1), "a/b c"),
            (tcp_at("h", 10809), ""),
            (Address::Unix("/tmp/ö&?#".into()), "ü%"),
        ] {
            let uri = Uri::of(&address, Security::Tls, export);
            let parsed = Uri::parse(&uri).expect(&uri);
            assert_eq!(
                (parsed.address, &*parsed.export),
                (address, export),
                "{uri}"
            );
            assert_eq!(parsed.security, Security::Tls);
        }
    }
}
