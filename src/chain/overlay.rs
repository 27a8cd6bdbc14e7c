//! A temporary layer on top of an open disk.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::chain::{Chain, MAX_LAYERS};
use crate::error::{Error, ErrorKind, Result};
use crate::image::overlay::Overlay;

impl Chain {
    /// The same disk with a temporary layer on top that takes the writes; the layers it had are
    /// no longer written to, whatever they were opened for.
    ///
    /// # Errors
    /// `OutOfRange` for a chain that is as long as it may be; the host's.
    pub fn with_overlay(mut self) -> Result<Self> {
        if self.layers.len() >= MAX_LAYERS {
            return Err(Error::new(
                ErrorKind::OutOfRange,
                format!("the chain has {MAX_LAYERS} layers, and no more are allowed above them"),
            )
            .at_opt(self.top().storage().path()));
        }
        let mut name = OsString::from("snapshot");
        if let Some(path) = self.top().storage().path() {
            name.push(" of ");
            name.push(path);
        }
        let overlay = Overlay::temporary(self.virtual_size(), &PathBuf::from(name))?;
        self.layers.insert(0, Box::new(overlay));
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::Arc;

    use super::*;
    use crate::chain::Base;
    use crate::formats::raw;
    use crate::image::Image;
    use crate::image::open::OpenOptions;
    use crate::storage::Zeroing;
    use crate::storage::memory::{Fault, MemoryStorage, Op};
    use crate::util::align::len64;
    use crate::util::grace::Grace;

    /// An overlay in memory over a raw image of `base`.
    fn chain(base: &[u8]) -> (Chain, Arc<MemoryStorage>, Arc<MemoryStorage>) {
        let below = Arc::new(MemoryStorage::from_bytes(base));
        let above = Arc::new(MemoryStorage::new());
        let image = (raw::DRIVER.open)(below.clone(), &OpenOptions::default()).expect("opens");
        let overlay: Box<dyn Image> = Box::new(Overlay::new(above.clone(), len64(base.len())));
        let chain = Chain::new(vec![overlay, image], Base::Zeroes, Arc::<Grace>::default());
        (chain.expect("two layers"), below, above)
    }

    fn read(chain: &Chain) -> Vec<u8> {
        let mut bytes = vec![1; usize::try_from(chain.virtual_size()).expect("small")];
        chain.read_at(&mut bytes, 0).expect("reads");
        bytes
    }

    fn some_range(random: &mut fastrand::Rng, len: usize) -> Range<usize> {
        let start = random.usize(0..=len);
        start..random.usize(start..=len.min(start + (200 << 10)))
    }

    fn wide(range: &Range<usize>) -> Range<u64> {
        len64(range.start)..len64(range.end)
    }

    #[test]
    fn any_changes_read_back_and_the_layer_below_is_untouched() {
        for seed in 0..8 {
            let mut random = fastrand::Rng::with_seed(seed);
            let base: Vec<u8> = (0..600_000).map(|i| (i % 251) as u8 | 1).collect();
            let (chain, below, _) = chain(&base);
            let mut model = base.clone();
            for step in 0..400 {
                let range = some_range(&mut random, model.len());
                match random.u8(0..10) {
                    0..5 => {
                        let bytes = vec![random.u8(1..); range.len()];
                        chain.write_at(&bytes, len64(range.start)).expect("writes");
                        model[range].copy_from_slice(&bytes);
                    }
                    5 => {
                        chain.zero(wide(&range), Zeroing::MayUnmap).expect("zeroes");
                        model[range].fill(0);
                    }
                    6 => {
                        chain
                            .zero(wide(&range), Zeroing::KeepSpace)
                            .expect("zeroes");
                        model[range].fill(0);
                    }
                    7 => {
                        let before = model[range.clone()].to_vec();
                        chain.discard(wide(&range)).expect("discards");
                        let mut after = vec![0; range.len()];
                        chain
                            .read_at(&mut after, len64(range.start))
                            .expect("reads");
                        for (old, new) in before.iter().zip(&after) {
                            assert!(new == old || *new == 0);
                        }
                        model[range].copy_from_slice(&after);
                    }
                    _ if random.u8(0..4) == 0 => {
                        let len = random.usize(0..700_000);
                        chain.resize(len64(len)).expect("resizes");
                        model.resize(len, 0);
                    }
                    _ => {}
                }
                assert!(read(&chain) == model, "seed {seed} step {step}");
            }
            assert_eq!(below.to_bytes(), base);
        }
    }

    #[test]
    fn threads_that_write_into_one_cluster_lose_nothing() {
        let (chain, ..) = chain(&[7; 256 << 10]);
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                let chain = &chain;
                scope.spawn(move || {
                    for at in (u64::from(thread) * 512..256 << 10).step_by(2048) {
                        chain.write_at(&[thread + 1; 512], at).expect("writes");
                    }
                });
            }
        });
        for (index, chunk) in read(&chain).chunks(512).enumerate() {
            assert!(chunk.iter().all(|b| usize::from(*b) == index % 4 + 1));
        }
    }

    #[test]
    fn a_write_that_fails_leaves_the_bytes_as_they_were() {
        let (chain, _, above) = chain(&[7; 200_000]);
        above.inject(Fault {
            op: Op::Change,
            after: 1,
            count: 1,
            errno: libc::ENOSPC,
        });
        let error = chain.write_at(&[1; 100], 1000).expect_err("no space");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(read(&chain), vec![7; 200_000]);
        chain.write_at(&[1; 100], 1000).expect("space again");
        assert_eq!(
            read(&chain)[900..1200].iter().filter(|b| **b == 1).count(),
            100
        );
    }

    #[test]
    fn zeroing_a_disk_of_exbibytes_takes_one_entry() {
        let above = Arc::new(MemoryStorage::new());
        let overlay = Overlay::new(above.clone(), 1 << 62);
        let chain = Chain::new(vec![Box::new(overlay)], Base::Zeroes, Arc::default());
        let chain = chain.expect("one layer");
        chain.zero(0..1 << 62, Zeroing::MayUnmap).expect("zeroes");
        chain.write_at(&[1], (1 << 62) - 1).expect("writes");
        let mut byte = [0];
        chain.read_at(&mut byte, (1 << 62) - 1).expect("reads");
        assert_eq!(byte, [1]);
        assert!(chain.write_at(&[1], 1 << 62).is_err());
    }

    #[test]
    fn messages_say_what_the_layer_is_a_snapshot_of() {
        let storage = Arc::new(MemoryStorage::from_bytes(&[1; 10]).with_path("a.raw"));
        let image = (raw::DRIVER.open)(storage, &OpenOptions::default()).expect("opens");
        let chain = Chain::new(vec![image], Base::Zeroes, Arc::default()).expect("one layer");
        let chain = chain.with_overlay().expect("a temporary file");
        let error = chain.write_at(&[1], 10).expect_err("past the end");
        assert!(
            error.to_string().starts_with("snapshot of a.raw: "),
            "{error}"
        );
        chain.write_at(&[2], 9).expect("writes");
        assert_eq!(read(&chain)[8..], [1, 2]);
    }
}
