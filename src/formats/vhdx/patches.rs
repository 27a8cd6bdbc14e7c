//! Changes of the file that are in its log and not in place yet.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::error::Result;
use crate::formats::vhdx::entry::{Descriptor, PAGE, Ring, SECTOR, page};
use crate::storage::{Storage, Zeroing, zero_or_write};
use crate::util::align::{clamp_len, down, len64};
use crate::util::range::intersect;

/// Bytes put in place by one write.
const TOGETHER: usize = 1 << 20;

/// A page as it is to be.
#[derive(Debug)]
enum Patch {
    /// In memory.
    Bytes(Box<[u8; PAGE]>),
    /// In the log, but for the first and the last bytes.
    Logged {
        sector: u64,
        lead: [u8; 8],
        trail: [u8; 4],
    },
}

/// Pages and ranges of the file that are to read otherwise.
#[derive(Debug, Default)]
pub(super) struct Patches {
    pages: BTreeMap<u64, Patch>,
    /// Ranges that read as zeroes but for `pages`: starts and ends, apart from each other.
    zeroes: BTreeMap<u64, u64>,
    /// How long the file is to be at least.
    pub(super) size: u64,
}

impl Patches {
    pub(super) fn is_empty(&self) -> bool {
        self.pages.is_empty() && self.zeroes.is_empty() && self.size == 0
    }

    /// Adds what an entry says, which comes after all before.
    pub(super) fn add(&mut self, descriptor: Descriptor) {
        match descriptor {
            Descriptor::Data {
                host,
                sector,
                lead,
                trail,
            } => {
                let patch = Patch::Logged {
                    sector,
                    lead,
                    trail,
                };
                self.pages.insert(host, patch);
                self.size = self.size.max(host + SECTOR);
            }
            Descriptor::Zero(host) => self.add_zeroes(host),
        }
    }

    fn add_zeroes(&mut self, mut host: Range<u64>) {
        if host.is_empty() {
            return;
        }
        let gone: Vec<u64> = self.pages.range(host.clone()).map(|(at, _)| *at).collect();
        for at in gone {
            self.pages.remove(&at);
        }
        while let Some((start, end)) = self.zeroes.range(..=host.end).next_back() {
            let (start, end) = (*start, *end);
            if end < host.start {
                break;
            }
            self.zeroes.remove(&start);
            host = host.start.min(start)..host.end.max(end);
        }
        self.zeroes.insert(host.start, host.end);
    }

    /// Adds pages that were just logged.
    pub(super) fn add_pages(&mut self, pages: Vec<(u64, Box<[u8; PAGE]>)>) {
        let pages = pages.into_iter();
        self.pages
            .extend(pages.map(|(host, page)| (host, Patch::Bytes(page))));
    }

    /// Lays the changes over bytes of the file from `host` on.
    pub(super) fn lay_over(
        &self,
        file: &dyn Storage,
        ring: &Ring,
        buf: &mut [u8],
        host: u64,
    ) -> Result<()> {
        let range = host..host + len64(buf.len());
        let within = |part: &Range<u64>| {
            clamp_len(part.start - host, usize::MAX)..clamp_len(part.end - host, usize::MAX)
        };
        for (start, end) in self.zeroes.range(..range.end).rev() {
            let Some(met) = intersect(&(*start..*end), &range) else {
                break;
            };
            buf[within(&met)].fill(0);
        }
        for (at, patch) in self.pages.range(down(host, SECTOR)..range.end) {
            if let Some(met) = intersect(&(*at..at + SECTOR), &range) {
                let page = patch.bytes(file, ring)?;
                let from = clamp_len(met.start - at, PAGE)..clamp_len(met.end - at, PAGE);
                buf[within(&met)].copy_from_slice(&page[from]);
            }
        }
        Ok(())
    }

    /// Puts all changes in place.
    ///
    /// # Errors
    /// The host's; then any part of them may be.
    pub(super) fn apply(&self, file: &dyn Storage, ring: &Ring) -> Result<()> {
        for (start, end) in &self.zeroes {
            if let Some(stored) = intersect(&(*start..*end), &(0..file.size())) {
                zero_or_write(file, stored, Zeroing::MayUnmap)?;
            }
        }
        let mut run: (u64, Vec<u8>) = (0, Vec::new());
        for (at, patch) in &self.pages {
            if *at != run.0 + len64(run.1.len()) || run.1.len() >= TOGETHER {
                write(file, &run)?;
                run = (*at, Vec::new());
            }
            run.1.extend(&patch.bytes(file, ring)?[..]);
        }
        write(file, &run)?;
        match file.size() < self.size && !file.has_fixed_len() {
            true => file.set_len(self.size),
            false => Ok(()),
        }
    }
}

fn write(file: &dyn Storage, run: &(u64, Vec<u8>)) -> Result<()> {
    match run.1.is_empty() {
        true => Ok(()),
        false => file.write_at(&run.1, run.0),
    }
}

impl Patch {
    fn bytes(&self, file: &dyn Storage, ring: &Ring) -> Result<[u8; PAGE]> {
        match self {
            Self::Bytes(bytes) => Ok(**bytes),
            Self::Logged {
                sector,
                lead,
                trail,
            } => {
                let mut bytes = [0; PAGE];
                ring.read(file, &mut bytes, *sector)?;
                Ok(page(bytes, *lead, *trail))
            }
        }
    }
}
