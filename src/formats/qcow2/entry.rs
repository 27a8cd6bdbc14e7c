//! Entries of first-level and second-level tables, decoded.

use std::ops::Range;

use crate::error::{Error, Result};
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

/// Where a cluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cluster {
    /// Nowhere: the layer below has it.
    Unallocated,
    /// At `host`; `copied` allows changes in place.
    Standard {
        /// Offset in the data file.
        host: u64,
        /// The refcount is exactly one.
        copied: bool,
        /// Reads as zeroes all the same.
        zero: bool,
    },
    /// Reads as zeroes and has no space.
    Zero,
    /// Compressed, in these bytes of the image file; the stream may end before the range does.
    Compressed(Packed),
}

/// Host bytes of a compressed cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packed {
    /// Offset of the first byte in the image file.
    pub(super) start: u64,
    /// End of its last sector.
    pub(super) end: u64,
}

/// How one subcluster reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subcluster {
    /// The layer below has it.
    Below,
    /// Zeroes.
    Zero,
    /// At its place in the cluster.
    Stored,
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

    /// Where the block of an entry of the refcount table is, in a file of `len` bytes; what is
    /// wrong with the entry, where something is.
    pub(super) fn refcount_block(
        self,
        entry: u64,
        len: u64,
    ) -> std::result::Result<Option<u64>, String> {
        let size = self.cluster_size();
        if entry & !OFFSET != 0 || !is_aligned(entry, size) || entry >= len {
            return Err(format!(
                "is at {entry:#x} (allowed: multiples of {size:#x} below {len:#x})"
            ));
        }
        Ok(Some(entry).filter(|host| *host != 0))
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
            return self.compressed(entry).map(Cluster::Compressed);
        }
        let host = entry & OFFSET;
        let zero = entry & ZERO != 0 && !self.extended && self.version >= 3;
        match (host, zero) {
            (0, true) => Ok(Cluster::Zero),
            (0, false) if entry & COPIED == 0 => Ok(Cluster::Unallocated),
            (0, false) => Ok(Cluster::Standard {
                host,
                copied: true,
                zero,
            }),
            _ => {
                self.check_aligned("cluster", host)?;
                Ok(Cluster::Standard {
                    host,
                    copied: entry & COPIED != 0,
                    zero,
                })
            }
        }
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
    fn compressed(self, entry: u64) -> Result<Packed> {
        let split = self.packed_bits();
        let host = entry & ((1 << split) - 1);
        let sectors = (entry & !(COPIED | COMPRESSED)) >> split;
        let end = (host - host % 512).checked_add((sectors + 1) * 512);
        end.map(|end| Packed { start: host, end }).ok_or_else(|| {
            Error::corrupt(format!(
                "compressed cluster entry {entry:#018x} ends past 2^64"
            ))
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
    pub(super) fn subcluster(self, cluster: &Cluster, bits: u64, index: u32) -> Result<Subcluster> {
        let stored = bits & (1 << index) != 0;
        let zero = bits & (1 << (index + SUBCLUSTERS)) != 0;
        match (stored, zero, cluster) {
            (true, true, _) => Err(Error::corrupt(format!(
                "subcluster {index} is both stored and zero (bitmap {bits:#018x})"
            ))),
            (true, false, Cluster::Standard { .. }) => Ok(Subcluster::Stored),
            (true, false, _) => Err(Error::corrupt(format!(
                "subcluster {index} is stored in a cluster that has no space (bitmap {bits:#018x})"
            ))),
            (false, true, _) => Ok(Subcluster::Zero),
            (false, false, _) => Ok(Subcluster::Below),
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
        let packed = |start, end| Cluster::Compressed(Packed { start, end });
        let standard = |host, copied, zero| Cluster::Standard { host, copied, zero };
        let cases = [
            (0, Cluster::Unallocated),
            (ZERO, Cluster::Zero),
            (0x5_0000, standard(0x5_0000, false, false)),
            (COPIED | 0x5_0000, standard(0x5_0000, true, false)),
            (COPIED | 0x5_0000 | ZERO, standard(0x5_0000, true, true)),
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
                    let expected = Packed { start: host, end };
                    assert_eq!(found, Cluster::Compressed(expected), "{host:#x} {len}");
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
            Cluster::Unallocated
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
            Subcluster::Stored
        );
        assert_eq!(
            layout.subcluster(&cluster, 1 << 32, 0).expect("valid"),
            Subcluster::Zero
        );
        assert_eq!(
            layout.subcluster(&cluster, 2, 0).expect("valid"),
            Subcluster::Below
        );
        assert!(layout.subcluster(&cluster, 1 << 32 | 1, 0).is_err());
        assert!(layout.subcluster(&Cluster::Unallocated, 1, 0).is_err());
    }
}
