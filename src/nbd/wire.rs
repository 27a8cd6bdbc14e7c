//! Numbers and messages of the protocol.  All integers on the wire are big-endian.

/// First word of a server's greeting.
pub const GREETING: u64 = 0x4e42_444d_4147_4943;
/// Second word of it, and first word of each option: `IHAVEOPT`.
pub const OPTION: u64 = 0x4948_4156_454f_5054;
/// Second word of a server that speaks the protocol of before 2012.
pub const OLDSTYLE: u64 = 0x0000_4202_8186_1253;
/// First word of an answer to an option.
pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// First word of a request.
pub const REQUEST: u32 = 0x2560_9513;
/// First word of a request with an extended header.
pub const EXTENDED_REQUEST: u32 = 0x21e4_1c71;
/// First word of a simple reply.
pub const SIMPLE_REPLY: u32 = 0x6744_6698;
/// First word of a chunk of a structured reply.
pub const STRUCTURED_REPLY: u32 = 0x668e_33ef;
/// First word of a chunk of a reply with an extended header.
pub const EXTENDED_REPLY: u32 = 0x6e8a_278c;

/// Handshake flags, the server's and the client's.
pub mod handshake {
    /// Options get answers.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No 124 zeroes after the answer to `EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 2;
}

/// Options of the handshake.
pub mod option {
    /// Begin with an export; has no answer of its own.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// Name all exports.
    pub const LIST: u32 = 3;
    /// Begin TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and begin with it.
    pub const GO: u32 = 7;
    /// Replies come in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name the metadata contexts of an export.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts of an export.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Headers have 64-bit lengths.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Answers to options; those with the top bit are refusals.
pub mod answer {
    /// Done; the last answer to an option.
    pub const ACK: u32 = 1;
    /// An export's name.
    pub const SERVER: u32 = 2;
    /// A fact about an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in all refusals.
    pub const ERROR: u32 = 1 << 31;
    /// The option is not known.
    pub const UNSUPPORTED: u32 = ERROR | 1;
    /// The server's owner does not want it.
    pub const POLICY: u32 = ERROR | 2;
    /// The option makes no sense.
    pub const INVALID: u32 = ERROR | 3;
    /// The platform does not have it.
    pub const PLATFORM: u32 = ERROR | 4;
    /// TLS comes first.
    pub const TLS_REQUIRED: u32 = ERROR | 5;
    /// There is no such export.
    pub const UNKNOWN: u32 = ERROR | 6;
    /// The server is about to end.
    pub const SHUTDOWN: u32 = ERROR | 7;
    /// The client must ask for block sizes.
    pub const BLOCK_SIZE_REQUIRED: u32 = ERROR | 8;
    /// The option is too long.
    pub const TOO_BIG: u32 = ERROR | 9;
    /// The client must ask for extended headers.
    pub const EXTENDED_HEADERS_REQUIRED: u32 = ERROR | 10;
}

/// Facts about an export.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Its name.
    pub const NAME: u16 = 1;
    /// A text about it.
    pub const DESCRIPTION: u16 = 2;
    /// Smallest, best and largest length of requests.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export can do.
pub mod can {
    /// The flags mean something.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// No writes.
    pub const READ_ONLY: u16 = 1 << 1;
    /// Flush.
    pub const FLUSH: u16 = 1 << 2;
    /// Writes that are durable when they are answered.
    pub const FUA: u16 = 1 << 3;
    /// Trim.
    pub const TRIM: u16 = 1 << 5;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 1 << 6;
    /// Replies in one piece on demand.
    pub const DF: u16 = 1 << 7;
    /// A flush on one connection covers all of them.
    pub const MULTI_CONN: u16 = 1 << 8;
    /// Cache.
    pub const CACHE: u16 = 1 << 10;
    /// Write zeroes that fails where it would not be fast.
    pub const FAST_ZERO: u16 = 1 << 11;
}

/// Commands.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// The client leaves.
    pub const DISCONNECT: u16 = 2;
    /// Make completed writes durable.
    pub const FLUSH: u16 = 3;
    /// Give space back.
    pub const TRIM: u16 = 4;
    /// Read ahead.
    pub const CACHE: u16 = 5;
    /// Zero a range.
    pub const WRITE_ZEROES: u16 = 6;
    /// Tell the extents of a range.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
pub mod flag {
    /// Durable before the answer.
    pub const FUA: u16 = 1 << 0;
    /// Zeroes keep their space.
    pub const NO_HOLE: u16 = 1 << 1;
    /// The reply comes in one piece.
    pub const DF: u16 = 1 << 2;
    /// One extent is enough.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Zeroes are refused where they would not be fast.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// A payload follows an extended header.
    pub const PAYLOAD: u16 = 1 << 5;
}

/// Chunks of a structured reply.
pub mod chunk {
    /// Flag: the last one.
    pub const DONE: u16 = 1;
    /// Nothing in it.
    pub const NONE: u16 = 0;
    /// Bytes.
    pub const DATA: u16 = 1;
    /// Zeroes.
    pub const HOLE: u16 = 2;
    /// Extents with 32-bit lengths.
    pub const STATUS: u16 = 5;
    /// Extents with 64-bit lengths.
    pub const STATUS_EXTENDED: u16 = 6;
    /// Set in all chunks that tell of a failure.
    pub const IS_ERROR: u16 = 1 << 15;
    /// The request failed.
    pub const ERROR: u16 = IS_ERROR | 1;
    /// The request failed at an offset.
    pub const ERROR_OFFSET: u16 = IS_ERROR | 2;
}

/// Error numbers.
pub mod errno {
    /// Not permitted: a change to a read-only export.
    pub const PERM: u32 = 1;
    /// Any failure of the host.
    pub const IO: u32 = 5;
    /// Not enough memory.
    pub const NOMEM: u32 = 12;
    /// The request makes no sense.
    pub const INVAL: u32 = 22;
    /// No space left, or past the end.
    pub const NOSPC: u32 = 28;
    /// Too long.
    pub const OVERFLOW: u32 = 75;
    /// Not supported.
    pub const NOTSUP: u32 = 95;
    /// The server is about to end.
    pub const SHUTDOWN: u32 = 108;
}

/// Flags of the context `base:allocation`.
pub mod allocation {
    /// No space is taken.
    pub const HOLE: u32 = 1;
    /// Reads as zeroes.
    pub const ZERO: u32 = 2;
}

/// The context that tells data from holes.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The context that tells the layer, from 1 for the top; 0: none.
pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
/// Before the name of a dirty bitmap.
pub const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";

/// Most bytes of a name or a text.
pub const MAX_STRING: usize = 4096;
/// What every server takes in one request, and all that this one does.
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// How requests and replies look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Headers {
    /// One reply to a request, with a 16-byte header.
    #[default]
    Simple,
    /// Replies to reads and block status in chunks.
    Structured,
    /// Requests and replies with 64-bit lengths.
    Extended,
}

impl Headers {
    /// Bytes of a request's header.
    pub fn request_len(self) -> usize {
        match self {
            Self::Simple | Self::Structured => 28,
            Self::Extended => 32,
        }
    }
}

/// The header of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Flags of the command.
    pub flags: u16,
    /// The command.
    pub command: u16,
    /// Chosen by the client, to know the reply by.
    pub cookie: u64,
    /// Offset in the export.
    pub offset: u64,
    /// Length in bytes; with simple and structured headers below 2^32.
    pub len: u64,
}

impl Request {
    /// Appends it as it goes over the wire.
    pub fn encode(&self, headers: Headers, to: &mut Vec<u8>) {
        let magic = match headers {
            Headers::Simple | Headers::Structured => REQUEST,
            Headers::Extended => EXTENDED_REQUEST,
        };
        to.extend(magic.to_be_bytes());
        to.extend(self.flags.to_be_bytes());
        to.extend(self.command.to_be_bytes());
        to.extend(self.cookie.to_be_bytes());
        to.extend(self.offset.to_be_bytes());
        match headers {
            Headers::Extended => to.extend(self.len.to_be_bytes()),
            _ => to.extend(u32::try_from(self.len).unwrap_or(u32::MAX).to_be_bytes()),
        }
    }

    /// The header in `bytes`, which has [`Headers::request_len`] of them; `None`: this is none.
    pub fn decode(headers: Headers, bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields::new(bytes);
        let magic = match headers {
            Headers::Simple | Headers::Structured => REQUEST,
            Headers::Extended => EXTENDED_REQUEST,
        };
        if fields.u32()? != magic {
            return None;
        }
        Some(Self {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            len: match headers {
                Headers::Extended => fields.u64()?,
                _ => fields.u32()?.into(),
            },
        })
    }
}

/// Reads integers and strings off the front of a message; `None` where it is too short.
#[derive(Debug, Clone)]
pub struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    /// From the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// What is left.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// The next `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.rest.split_at_checked(len)?;
        self.rest = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    /// The next 16-bit number.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next 32-bit number.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next 64-bit number.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string with its length in front, no longer than [`MAX_STRING`], valid UTF-8.
    pub fn string(&mut self) -> Option<&'a str> {
        let len = usize::try_from(self.u32()?).ok()?;
        if len > MAX_STRING {
            return None;
        }
        let text = std::str::from_utf8(self.bytes(len)?).ok()?;
        (!text.contains('\0')).then_some(text)
    }
}

/// Appends a string with its length in front.
pub fn put_string(to: &mut Vec<u8>, text: &str) {
    let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
    to.extend(len.to_be_bytes());
    to.extend(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_comes_back_as_it_was() {
        let request = Request {
            flags: flag::FUA,
            command: command::WRITE_ZEROES,
            cookie: 0x0102_0304_0506_0708,
            offset: 1 << 40,
            len: 0xffff_0000,
        };
        for headers in [Headers::Simple, Headers::Structured, Headers::Extended] {
            let mut bytes = Vec::new();
            request.encode(headers, &mut bytes);
            assert_eq!(bytes.len(), headers.request_len());
            assert_eq!(Request::decode(headers, &bytes), Some(request));
            bytes[0] ^= 1;
            assert_eq!(Request::decode(headers, &bytes), None);
        }
    }

    #[test]
    fn strings_that_lie_about_their_length_are_refused() {
        let mut bytes = Vec::new();
        put_string(&mut bytes, "disk");
        assert_eq!(Fields::new(&bytes).string(), Some("disk"));
        bytes[3] = 5;
        assert_eq!(Fields::new(&bytes).string(), None);
        bytes[..4].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(Fields::new(&bytes).string(), None);
        assert_eq!(Fields::new(&[0, 0, 0, 1, 0]).string(), None);
        assert_eq!(Fields::new(&[0, 0, 0, 1, 0xff]).string(), None);
    }
}
