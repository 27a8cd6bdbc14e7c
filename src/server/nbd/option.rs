//! What is told of exports during the handshake.

use crate::nbd::wire::{
    ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP, Fields, Headers, info, put_string,
};
use crate::server::nbd::server::Served;
use crate::server::nbd::status::Context;

/// What a client asks of an export.
pub(super) struct Wanted<'a> {
    pub(super) name: &'a str,
    facts: Vec<u16>,
}

impl<'a> Wanted<'a> {
    /// The data of `INFO` and `GO`; `None` where it is wrong.
    pub(super) fn decode(data: &'a [u8]) -> Option<Self> {
        let mut fields = Fields::new(data);
        let name = fields.string()?;
        let count = fields.u16()?;
        if fields.rest().len() != usize::from(count) * 2 {
            return None;
        }
        let facts = (0..count).map(|_| fields.u16()).collect::<Option<_>>()?;
        Some(Self { name, facts })
    }

    fn asks(&self, fact: u16) -> bool {
        self.facts.contains(&fact)
    }
}

/// The facts about an export, in the order in which they are told.
pub(super) fn facts(export: &Served, wanted: &Wanted<'_>, headers: Headers) -> Vec<Vec<u8>> {
    let fact = |kind: u16| kind.to_be_bytes().to_vec();
    let mut facts = Vec::with_capacity(4);
    if wanted.asks(info::NAME) {
        let mut name = fact(info::NAME);
        name.extend(export.export.name.as_bytes());
        facts.push(name);
    }
    if wanted.asks(info::DESCRIPTION) && !export.export.description.is_empty() {
        let mut text = fact(info::DESCRIPTION);
        text.extend(export.export.description.as_bytes());
        facts.push(text);
    }
    let sizes = export.block_sizes();
    let mut blocks = fact(info::BLOCK_SIZE);
    for size in [sizes.min, sizes.preferred, sizes.max] {
        blocks.extend(size.to_be_bytes());
    }
    facts.push(blocks);
    let mut main = fact(info::EXPORT);
    main.extend(export.size().to_be_bytes());
    main.extend(export.flags(headers).to_be_bytes());
    facts.push(main);
    facts
}

/// An export as `LIST` tells it.
pub(super) fn listed(export: &Served) -> Vec<u8> {
    let mut data = Vec::new();
    put_string(&mut data, &export.export.name);
    data.extend(export.export.description.as_bytes());
    data
}

/// The data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`: an export and queries.
pub(super) fn decode_queries(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut fields = Fields::new(data);
    let name = fields.string()?;
    let count = fields.u32()?;
    // Each one takes four bytes at least.
    if usize::try_from(count).ok()? > fields.rest().len() / 4 {
        return None;
    }
    let queries = (0..count).map(|_| fields.string()).collect::<Option<_>>()?;
    fields.rest().is_empty().then_some((name, queries))
}

fn all(export: &Served) -> Vec<Context> {
    let bitmaps = 0..export.bitmaps.len();
    [Context::Allocation, Context::Depth]
        .into_iter()
        .chain(bitmaps.map(Context::Bitmap))
        .collect()
}

/// The contexts that match any of the queries; all of them where there is none.
pub(super) fn listed_contexts(export: &Served, queries: &[&str]) -> Vec<Context> {
    let matches = |name: &str| {
        queries.iter().any(|&query| match query {
            "base:" => name == BASE_ALLOCATION,
            "qemu:" => name == ALLOCATION_DEPTH || name.starts_with(DIRTY_BITMAP),
            DIRTY_BITMAP => name.starts_with(DIRTY_BITMAP),
            query => query == name,
        })
    };
    let mut contexts = all(export);
    contexts.retain(|c| queries.is_empty() || matches(&c.name(export)));
    contexts
}

/// The contexts that are named by the queries.
pub(super) fn chosen_contexts(export: &Served, queries: &[&str]) -> Vec<Context> {
    let mut contexts = all(export);
    contexts.retain(|c| queries.contains(&&*c.name(export)));
    contexts
}
