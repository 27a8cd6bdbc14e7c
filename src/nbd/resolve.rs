//! From names of hosts to addresses.
//!
//! The C library's own way loads further libraries while it runs, which a static program cannot
//! rely on.  So: numbers, `localhost`, `/etc/hosts`, and the name servers of `/etc/resolv.conf`.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use crate::nbd::wire::Fields;

/// How long one name server may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often each of them is asked.
const ROUNDS: usize = 2;
/// Most name servers, domains that are searched, and answers: what others take, and more.
const MAX_SERVERS: usize = 3;
const MAX_SEARCH: usize = 6;
const MAX_ANSWERS: u16 = 64;
const DNS_PORT: u16 = 53;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;
const NO_SUCH_NAME: u16 = 3;

/// The addresses of a host, by number or name, with a port.
///
/// # Errors
/// `NotFound` where it has none, or nobody knows.
pub fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let found = match known(host) {
        Some(found) => found,
        None => match in_hosts(&read("/etc/hosts"), host) {
            found if !found.is_empty() => found,
            _ => Servers::parse(&read("/etc/resolv.conf")).look_up(host),
        },
    };
    if found.is_empty() {
        let text = format!("no address of the host '{host}' is known");
        return Err(io::Error::new(io::ErrorKind::NotFound, text));
    }
    Ok(found
        .into_iter()
        .map(|ip| SocketAddr::new(ip, port))
        .collect())
}

/// What needs no asking.
fn known(host: &str) -> Option<Vec<IpAddr>> {
    if let Ok(number) = host.parse() {
        return Some(vec![number]);
    }
    let local = || vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    host.trim_end_matches('.')
        .eq_ignore_ascii_case("localhost")
        .then(local)
}

/// The addresses that a text like `/etc/hosts` has for a host.
fn in_hosts(text: &str, host: &str) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut words = line.split('#').next().unwrap_or("").split_whitespace();
        let Some(Ok(address)) = words.next().map(str::parse) else {
            continue;
        };
        if words.any(|name| name.eq_ignore_ascii_case(host)) {
            found.push(address);
        }
    }
    found
}

/// Name servers, and domains that are searched.
#[derive(Debug, Default)]
struct Servers {
    addresses: Vec<SocketAddr>,
    search: Vec<String>,
}

impl Servers {
    /// From a text like `/etc/resolv.conf`.
    fn parse(text: &str) -> Self {
        let mut servers = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    let address = words.next().and_then(|a| a.parse().ok());
                    let address = address.map(|ip: IpAddr| SocketAddr::new(ip, DNS_PORT));
                    servers.addresses.extend(address);
                }
                Some("search" | "domain") => {
                    servers.search = words.take(MAX_SEARCH).map(str::to_owned).collect();
                }
                _ => {}
            }
        }
        servers.addresses.truncate(MAX_SERVERS);
        if servers.addresses.is_empty() {
            let own = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), DNS_PORT);
            servers.addresses.push(own);
        }
        servers
    }

    fn look_up(&self, host: &str) -> Vec<IpAddr> {
        for name in self.names(host) {
            let mut found = self.ask(&name, TYPE_A);
            found.extend(self.ask(&name, TYPE_AAAA));
            if !found.is_empty() {
                return found;
            }
        }
        Vec::new()
    }

    /// The names to ask for, in order.
    fn names(&self, host: &str) -> Vec<String> {
        if let Some(whole) = host.strip_suffix('.') {
            return vec![whole.to_owned()];
        }
        let mut names: Vec<String> = self.search.iter().map(|d| format!("{host}.{d}")).collect();
        match host.contains('.') {
            true => names.insert(0, host.to_owned()),
            false => names.push(host.to_owned()),
        }
        names
    }

    fn ask(&self, name: &str, kind: u16) -> Vec<IpAddr> {
        let id = u16::try_from(RandomState::new().hash_one(name) & 0xffff).unwrap_or(0);
        let Some(query) = query(id, name, kind) else {
            return Vec::new();
        };
        for _ in 0..ROUNDS {
            for server in &self.addresses {
                // The next one may do better.
                if let Ok(Some(found)) = exchange(*server, &query, id, kind) {
                    return found;
                }
            }
        }
        Vec::new()
    }
}

/// Asks one server; `None`: it cannot tell.
fn exchange(
    server: SocketAddr,
    query: &[u8],
    id: u16,
    kind: u16,
) -> io::Result<Option<Vec<IpAddr>>> {
    let own: IpAddr = match server.ip() {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind(SocketAddr::new(own, 0))?;
    // Only what this server sends is received.
    socket.connect(server)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(query)?;
    let mut reply = [0; 1232];
    let len = socket.recv(&mut reply)?;
    Ok(answers(&reply[..len], id, kind))
}

/// A question; `None` for what is no name.
fn query(id: u16, name: &str, kind: u16) -> Option<Vec<u8>> {
    let mut query = Vec::with_capacity(name.len() + 18);
    query.extend(id.to_be_bytes());
    // Recursion is wanted; one question, and nothing else.
    for word in [0x0100u16, 1, 0, 0, 0] {
        query.extend(word.to_be_bytes());
    }
    if name.len() > 253 {
        return None;
    }
    for label in name.split('.') {
        let len = u8::try_from(label.len())
            .ok()
            .filter(|len| (1..64).contains(len))?;
        query.push(len);
        query.extend(label.as_bytes());
    }
    query.push(0);
    query.extend(kind.to_be_bytes());
    query.extend(CLASS_IN.to_be_bytes());
    Some(query)
}

/// The addresses in a reply; `None`: it is no reply to the question, or tells of a failure.
fn answers(reply: &[u8], id: u16, kind: u16) -> Option<Vec<IpAddr>> {
    let mut fields = Fields::new(reply);
    let (of, flags) = (fields.u16()?, fields.u16()?);
    let (questions, count) = (fields.u16()?, fields.u16()?);
    let _others = fields.u32()?;
    if of != id || flags & 0x8000 == 0 || questions != 1 {
        return None;
    }
    match flags & 0xf {
        0 => {}
        NO_SUCH_NAME => return Some(Vec::new()),
        _ => return None,
    }
    skip_name(&mut fields)?;
    fields.u32()?;
    let mut found = Vec::new();
    for _ in 0..count.min(MAX_ANSWERS) {
        skip_name(&mut fields)?;
        let (is, class, _ttl, len) = (fields.u16()?, fields.u16()?, fields.u32()?, fields.u16()?);
        let data = fields.bytes(len.into())?;
        if (is, class) != (kind, CLASS_IN) {
            continue;
        }
        let v4 = || <[u8; 4]>::try_from(data).map(IpAddr::from).ok();
        let v6 = || <[u8; 16]>::try_from(data).map(IpAddr::from).ok();
        found.push(if kind == TYPE_A { v4()? } else { v6()? });
    }
    Some(found)
}

/// Passes over a name; what it says is known or of no interest.
fn skip_name(fields: &mut Fields<'_>) -> Option<()> {
    loop {
        let len = *fields.bytes(1)?.first()?;
        match len {
            0 => return Some(()),
            1..64 => {
                fields.bytes(len.into())?;
            }
            // The rest stands elsewhere.
            192.. => {
                fields.bytes(1)?;
                return Some(());
            }
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    /// A reply with a name by reference, an alias, and the address.
    fn reply(id: u16, address: [u8; 4]) -> Vec<u8> {
        let mut reply = query(id, "disk.example", TYPE_A).expect("a name");
        reply[2..8].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 2]);
        reply.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 9, 0, 4, 1, b'x', 0xc0, 17]);
        reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4]);
        reply.extend(address);
        reply
    }

    #[test]
    fn numbers_and_localhost_need_no_asking() {
        assert_eq!(known("10.0.0.1"), Some(vec![ip("10.0.0.1")]));
        assert_eq!(known("::1"), Some(vec![ip("::1")]));
        assert_eq!(known("LocalHost."), Some(vec![ip("127.0.0.1"), ip("::1")]));
        assert_eq!(known("localhost.example"), None);
        assert_eq!(resolve("127.0.0.1", 7).expect("a number")[0].port(), 7);
    }

    #[test]
    fn a_list_of_hosts_is_read_as_it_is_written() {
        let text = "# 1.1.1.1 a\n10.0.0.1 a.b a\t# c\nfe80::1 A\nnonsense a\n";
        assert_eq!(in_hosts(text, "a"), [ip("10.0.0.1"), ip("fe80::1")]);
        assert_eq!(in_hosts(text, "a.B"), [ip("10.0.0.1")]);
        assert!(in_hosts(text, "c").is_empty());
    }

    #[test]
    fn names_are_searched_for_in_domains() {
        let servers = Servers::parse("search x y\nnameserver 1.2.3.4\nnameserver z\noptions a\n");
        assert_eq!(servers.addresses, [SocketAddr::new(ip("1.2.3.4"), 53)]);
        assert_eq!(servers.names("a"), ["a.x", "a.y", "a"]);
        assert_eq!(servers.names("a.b"), ["a.b", "a.b.x", "a.b.y"]);
        assert_eq!(servers.names("a.b."), ["a.b"]);
        assert!(query(1, "a..b", TYPE_A).is_none());
        assert!(query(1, &"a".repeat(64), TYPE_A).is_none());
    }

    #[test]
    fn a_reply_is_read_and_damage_in_it_harms_nobody() {
        let right = reply(7, [10, 0, 0, 9]);
        assert_eq!(answers(&right, 7, TYPE_A), Some(vec![ip("10.0.0.9")]));
        assert_eq!(answers(&right, 8, TYPE_A), None);
        assert_eq!(answers(&right, 7, TYPE_AAAA), Some(Vec::new()));
        for index in 0..right.len() {
            for bit in 0..8 {
                let mut damaged = right.clone();
                damaged[index] ^= 1 << bit;
                answers(&damaged, 7, TYPE_A);
                answers(&damaged[..index], 7, TYPE_A);
            }
        }
    }

    #[test]
    fn a_name_server_is_asked_and_believed() {
        let server = UdpSocket::bind("127.0.0.1:0").expect("binds");
        let address = server.local_addr().expect("has one");
        let serving = std::thread::spawn(move || {
            for _ in 0..2 {
                let mut asked = [0; 512];
                let (_, from) = server.recv_from(&mut asked).expect("is asked");
                let id = u16::from_be_bytes([asked[0], asked[1]]);
                let answer = reply(id, [10, 0, 0, 9]);
                server.send_to(&answer, from).expect("answers");
            }
        });
        let servers = Servers {
            addresses: vec![address],
            search: Vec::new(),
        };
        assert_eq!(servers.look_up("disk.example"), [ip("10.0.0.9")]);
        serving.join().expect("answered twice");
    }
}
