//! Entries of first-level and second-level tables, decoded.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::image::be64;
use crate::image::units::{Content, Space};
use crate::util::align::is_aligned;

/// Bits 9 to 55: where a table or cluster is.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63: the refcount of what it points at is exactly one, so it may be changed in place.
pub(super) const COPIED: u64 = 1 << 63;
/// Bit 62 of a second-level entry: the cluster is compressed.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a second-level entry (version 3, not extended): the cluster reads as zeroes.
pub(super) const ZERO: u64 = 1;
/// Host offsets have 56 bits, whatever the entry has room for.
const MAX_HOST_BITS: u32 = 56;
/// Subclusters of a cluster with extended entries.
pub(super) const SUBCLUSTERS: u32 = 32;

/// What decides how entries are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    /// log2 of the cluster size.
    pub(super) cluster_bits: u32,
    /// Entries have a second word with bits for subclusters.
    pub(super) extended: bool,
    /// Version 2: there are no zero clusters.
    pub(super) version: u32,
}

/// A cluster, as the first word of its entry has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cluster {
    /// Where it is; compressed bytes may end before their space does.
    pub(super) space: Space,
    /// It reads as zeroes all the same.
    pub(super) zero: bool,
}

impl Cluster {
    /// Nowhere: the layer below has it.
    pub(super) const BELOW: Self = Self {
        space: Space::None,
        zero: false,
    };

    /// Where it is stored whole.
    pub(super) fn whole(self) -> Option<u64> {
        match self.space {
            Space::Own(host) | Space::Shared(host) => Some(host),
            Space::None | Space::Encoded { .. } => None,
        }
    }

    /// The bytes that it is compressed to.
    pub(super) fn packed(self) -> Option<Range<u64>> {
        match self.space {
            Space::Encoded { start, end } => Some(start..end),
            _ => None,
        }
    }
}

impl Layout {
    /// Cluster size in bytes.
    pub(super) fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Size of a subcluster in bytes; that of a cluster without extended entries.
    pub(super) fn subcluster_size(self) -> u64 {
        if self.extended {
            self.cluster_size() / u64::from(SUBCLUSTERS)
        } else {
            self.cluster_size()
        }
    }

    /// The clusters that a range of the file touches.
    pub(super) fn clusters(self, host: &Range<u64>) -> Range<u64> {
        host.start >> self.cluster_bits..host.end.div_ceil(self.cluster_size())
    }

    /// The bytes of the image or data file that a cluster has.
    pub(super) fn host(self, cluster: Cluster) -> Range<u64> {
        let whole = cluster.whole().map(|host| host..host + self.cluster_size());
        whole.or(cluster.packed()).unwrap_or(0..0)
    }

    /// The entries of a second-level table: the first word of each, and the second or 0.
    pub(super) fn entries(self, table: &[u8]) -> impl Iterator<Item = (u64, u64)> {
        let entries = table.chunks_exact(if self.extended { 16 } else { 8 });
        entries.map(|entry| {
            let mut words = be64::words(entry);
            (words.next().unwrap_or(0), words.next().unwrap_or(0))
        })
    }

    /// Gives each first word of the entries of a second-level table, but 0, to `change`, which says
    /// what it is to be; whether any changed.
    pub(super) fn change_entries(
        self,
        table: &mut [u8],
        mut change: impl FnMut(u64) -> Result<u64>,
    ) -> Result<bool> {
        let mut changed = false;
        let words = table.as_chunks_mut::<8>().0.iter_mut();
        for word in words.step_by(if self.extended { 2 } else { 1 }) {
            let old = u64::from_be_bytes(*word);
            let new = if old == 0 { 0 } else { change(old)? };
            changed |= new != old;
            *word = new.to_be_bytes();
        }
        Ok(changed)
    }

    /// Bytes of a second-level entry.
    pub(super) fn entry_len(self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Where the second-level table of a first-level entry is; `None`: there is none.
    pub(super) fn table(self, entry: u64) -> Result<Option<u64>> {
        let host = entry & OFFSET;
        if host == 0 {
            return Ok(None);
        }
        self.check_aligned("L2 table", host)?;
        Ok(Some(host))
    }

    /// As `table`, of an entry that is judged: what is wrong with it, where something is.
    pub(super) fn first_level(self, entry: u64) -> std::result::Result<Option<u64>, String> {
        let host = entry & OFFSET;
        if entry & !(OFFSET | COPIED) != 0 {
            return Err(format!("is {entry:#018x} (reserved bits must be 0)"));
        }
        if host == 0 && entry != 0 {
            return Err(format!("is {entry:#018x} (a flag without an offset)"));
        }
        if !is_aligned(host, self.cluster_size()) {
            return Err(format!(
                "points at {host:#x} (allowed: multiples of {:#x})",
                self.cluster_size()
            ));
        }
        Ok(Some(host).filter(|host| *host != 0))
    }

    /// Whether metadata lies in a file of `len` bytes; the last cluster may be there in part.
    pub(super) fn is_inside(self, host: &Range<u64>, len: u64) -> bool {
        let past = host.end.saturating_sub(len);
        let outside = !host.is_empty() && host.start >= len;
        past < self.cluster_size() && !outside && host.end >= host.start
    }

    /// A second-level entry's first word.
    pub(super) fn cluster(self, entry: u64) -> Result<Cluster> {
        if entry & COMPRESSED != 0 {
            return self.compressed(entry);
        }
        let host = entry & OFFSET;
        self.check_aligned("cluster", host)?;
        let zero = entry & ZERO != 0 && !self.extended && self.version >= 3;
        let space = match (host, entry & COPIED != 0) {
            (0, owned) if zero || !owned => Space::None,
            (host, true) => Space::Own(host),
            (host, false) => Space::Shared(host),
        };
        Ok(Cluster { space, zero })
    }

    /// The words of an entry for a cluster whose `len` compressed bytes (not 0) are at `host`.
    pub(super) fn packed_words(self, host: u64, len: u64) -> Vec<u64> {
        debug_assert!(len > 0 && host + len <= self.packed_limit());
        let sectors = (host + len - 1) / 512 - host / 512;
        let word = COMPRESSED | sectors << self.packed_bits() | host;
        if self.extended {
            vec![word, 0]
        } else {
            vec![word]
        }
    }

    /// The words of an entry for a cluster that is stored whole at `host`, and only here.
    pub(super) fn stored_words(self, host: u64) -> Vec<u64> {
        let word = host | COPIED;
        match self.extended {
            true => vec![word, (1 << SUBCLUSTERS) - 1],
            false => vec![word],
        }
    }

    /// Compressed bytes lie below this offset: an entry has no bits for more.
    pub(super) fn packed_limit(self) -> u64 {
        1 << self.packed_bits().min(MAX_HOST_BITS)
    }

    /// Bits of a compressed cluster's entry that are its offset; the count of further sectors is
    /// above them.
    fn packed_bits(self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    /// The entry's host bytes: an offset in the low bits, a count of further sectors above it.
    fn compressed(self, entry: u64) -> Result<Cluster> {
        let split = self.packed_bits();
        let host = entry & ((1 << split) - 1);
        let sectors = (entry & !(COPIED | COMPRESSED)) >> split;
        let end = (host - host % 512).checked_add((sectors + 1) * 512);
        let end = end.ok_or_else(|| {
            Error::corrupt(format!(
                "compressed cluster entry {entry:#018x} ends past 2^64"
            ))
        })?;
        Ok(Cluster {
            space: Space::Encoded { start: host, end },
            zero: false,
        })
    }

    fn check_aligned(self, what: &str, host: u64) -> Result<()> {
        if is_aligned(host, self.cluster_size()) {
            return Ok(());
        }
        Err(Error::corrupt(format!(
            "an {what} entry points at {host:#x} (allowed: multiples of {:#x})",
            self.cluster_size()
        )))
    }

    /// How a subcluster reads, from the entry's two words.
    pub(super) fn subcluster(self, cluster: &Cluster, bits: u64, index: u32) -> Result<Content> {
        let stored = bits & (1 << index) != 0;
        let zero = bits & (1 << (index + SUBCLUSTERS)) != 0;
        match (stored, zero, cluster.whole()) {
            (true, true, _) => Err(Error::corrupt(format!(
                "subcluster {index} is both stored and zero (bitmap {bits:#018x})"
            ))),
            (true, false, Some(_)) => Ok(Content::Stored),
            (true, false, _) => Err(Error::corrupt(format!(
                "subcluster {index} is stored in a cluster that has no space (bitmap {bits:#018x})"
            ))),
            (false, true, _) => Ok(Content::Zero),
            (false, false, _) => Ok(Content::Below),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout = Layout {
        cluster_bits: 16,
        extended: false,
        version: 3,
    };

    #[test]
    fn entries_decode_as_the_specification_says() {
        let cluster = |space, zero| Cluster { space, zero };
        let packed = |start, end| cluster(Space::Encoded { start, end }, false);
        let cases = [
            (0, Cluster::BELOW),
            (ZERO, cluster(Space::None, true)),
            (0x5_0000, cluster(Space::Shared(0x5_0000), false)),
            (COPIED | 0x5_0000, cluster(Space::Own(0x5_0000), false)),
            (
                COPIED | 0x5_0000 | ZERO,
                cluster(Space::Own(0x5_0000), true),
            ),
            (COMPRESSED | 0x5_0123, packed(0x5_0123, 0x5_0200)),
            (COMPRESSED | 3 << 54 | 0x5_0123, packed(0x5_0123, 0x5_0800)),
        ];
        for (entry, expected) in cases {
            assert_eq!(
                LAYOUT.cluster(entry).expect("valid"),
                expected,
                "{entry:#x}"
            );
        }
    }

    #[test]
    fn entries_of_compressed_clusters_lead_back_to_their_bytes() {
        for cluster_bits in 9..=21 {
            let layout = Layout {
                cluster_bits,
                ..LAYOUT
            };
            let size = layout.cluster_size();
            for host in [size, size + 1, 2 * size - 1, layout.packed_limit() - size] {
                for len in [1, 2, 511.min(size - 1), size - 1] {
                    let words = layout.packed_words(host, len);
                    let found = layout.cluster(words[0]).expect("valid");
                    let end = (host + len).next_multiple_of(512);
                    assert_eq!(found.packed(), Some(host..end), "{host:#x} {len}");
                }
            }
        }
    }

    #[test]
    fn a_misaligned_offset_is_corrupt() {
        assert!(LAYOUT.cluster(0x5_0200).is_err());
        assert!(LAYOUT.table(0x5_0200).is_err());
        assert_eq!(LAYOUT.table(COPIED).expect("no table"), None);
    }

    #[test]
    fn version_2_knows_no_zero_clusters() {
        let layout = Layout {
            version: 2,
            ..LAYOUT
        };
        assert_eq!(
            layout.cluster(ZERO).expect("the bit is reserved"),
            Cluster::BELOW
        );
    }

    #[test]
    fn a_subcluster_that_is_stored_and_zero_at_once_is_corrupt() {
        let layout = Layout {
            extended: true,
            ..LAYOUT
        };
        let cluster = layout.cluster(COPIED | 0x5_0000).expect("valid");
        assert_eq!(
            layout.subcluster(&cluster, 1, 0).expect("valid"),
            Content::Stored
        );
        assert_eq!(
            layout.subcluster(&cluster, 1 << 32, 0).expect("valid"),
            Content::Zero
        );
        assert_eq!(
            layout.subcluster(&cluster, 2, 0).expect("valid"),
            Content::Below
        );
        assert!(layout.subcluster(&cluster, 1 << 32 | 1, 0).is_err());
        assert!(layout.subcluster(&Cluster::BELOW, 1, 0).is_err());
    }
}
