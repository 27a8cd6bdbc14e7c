//! What makes one disk of another: found, ordered, encoded and handed to a format that holds it.

mod order;
mod scan;

use std::ops::Range;

use parking_lot::Mutex;

use crate::copy::joined::Joined;
use crate::copy::progress::Progress;
use crate::error::{Error, ErrorKind, Result};
use crate::image::compress::Encoder;
use crate::image::delta::{Data, Make, Plan, Step};
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};
use crate::util::parallel;

/// Blocks of the new disk at most, of which some thirty bytes each are in memory: 128 GiB where they have
/// 4 KiB.
const MAX_BLOCKS: u64 = 1 << 25;

/// The two disks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Disks<'a> {
    pub(super) old: &'a Joined,
    pub(super) new: &'a Joined,
    /// Bytes of a block.
    pub(super) block: u64,
}

impl Disks<'_> {
    fn block_len(&self) -> usize {
        clamp_len(self.block, usize::MAX)
    }

    /// Blocks of the new disk.
    fn blocks(&self) -> u64 {
        self.new.len() / self.block
    }
}

/// Bytes that a job over these disks goes through, for its progress.
pub fn work(old: &Joined, new: &Joined) -> u64 {
    let new = new.len().saturating_mul(2);
    old.len().saturating_add(new)
}

/// Writes into `storage`, an empty object, what makes `new` of `old`; tells `progress` of as many
/// bytes as [`work`] says.  The file is the same whatever `workers` is.
///
/// # Errors
/// `Unsupported` for a new disk that is shorter than the old one, or that ends within a block;
/// `OutOfRange` for one of too many blocks; `Cancelled`; those of the disks and of the host.
pub fn delta(
    old: &Joined,
    new: &Joined,
    plan: &dyn Plan,
    storage: &dyn Storage,
    workers: usize,
    progress: &dyn Progress,
) -> Result<()> {
    let block = plan.block();
    let disks = Disks { old, new, block };
    refuse(&disks)?;
    let workers = workers.clamp(1, super::MAX_WORKERS);
    let mut steps = scan::scan(&disks, plan.differs(), plan.most(), workers, progress)?;
    order::order(&mut steps);
    let steps = joined(&steps, plan.together());
    let bytes = |steps: &[Step]| {
        steps
            .iter()
            .map(|s| u64::from(s.blocks) * block)
            .sum::<u64>()
    };
    progress.advance(new.len().saturating_sub(bytes(&steps)));
    let mut fetch = |range: Range<usize>| -> Result<Vec<Data>> {
        progress.check()?;
        let steps = steps.get(range).unwrap_or_default();
        let data = encode(&disks, plan, steps, workers)?;
        progress.advance(bytes(steps));
        Ok(data)
    };
    plan.write(storage, &steps, &mut fetch)
}

fn refuse(disks: &Disks<'_>) -> Result<()> {
    let (old, new, block) = (disks.old.len(), disks.new.len(), disks.block);
    if !new.is_multiple_of(block) {
        return Err(Error::unsupported(format!(
            "the new disk has {new} bytes (allowed: a multiple of {block}, the size of a block)"
        )));
    }
    if new < old {
        return Err(Error::unsupported(format!(
            "the new disk has {new} bytes and the old one {old}: a file of the format cannot say that a disk shrinks"
        )));
    }
    match new / block > MAX_BLOCKS {
        true => Err(Error::new(
            ErrorKind::OutOfRange,
            format!(
                "the new disk has {} blocks (allowed: {MAX_BLOCKS})",
                new / block
            ),
        )),
        false => Ok(()),
    }
}

/// Stored blocks that follow each other as single steps, powers of two up to `most`.
fn joined(steps: &[Step], most: u32) -> Vec<Step> {
    let mut out: Vec<Step> = Vec::with_capacity(steps.len());
    let mut rest = steps;
    while let Some(first) = rest.first() {
        let mut blocks = 1;
        if first.make == Make::Store {
            let follows = |(n, step): &(u32, &Step)| {
                step.make == Make::Store && first.block.checked_add(*n) == Some(step.block)
            };
            let run = (0u32..).zip(rest).take(clamp_len(most.into(), usize::MAX));
            let run = u32::try_from(run.take_while(follows).count()).unwrap_or(1);
            blocks = 1 << run.max(1).ilog2();
        }
        out.push(Step { blocks, ..*first });
        rest = rest.get(blocks as usize..).unwrap_or_default();
    }
    out
}

/// The data of `steps`, encoded on all threads.
fn encode(disks: &Disks<'_>, plan: &dyn Plan, steps: &[Step], workers: usize) -> Result<Vec<Data>> {
    let out: Vec<Mutex<Data>> = steps.iter().map(|_| Mutex::default()).collect();
    let mut jobs = steps.iter().zip(&out);
    let has_data = |(step, _): &(&Step, _)| matches!(step.make, Make::Differ | Make::Store);
    let mut jobs = jobs.by_ref().filter(has_data);
    parallel::for_each(
        workers,
        &mut jobs,
        || (None, Buffers::default()),
        |(encoder, buffers), (step, out)| -> Result<()> {
            if encoder.is_none() {
                *encoder = Some(plan.encoder()?);
            }
            let encoder = encoder.as_mut().and_then(Option::as_mut);
            *out.lock() = encode_one(disks, plan, step, encoder, buffers)?;
            Ok(())
        },
    )?;
    Ok(out.into_iter().map(Mutex::into_inner).collect())
}

#[derive(Default)]
struct Buffers {
    new: Vec<u8>,
    old: Vec<u8>,
    out: Vec<u8>,
}

fn encode_one(
    disks: &Disks<'_>,
    plan: &dyn Plan,
    step: &Step,
    encoder: Option<&mut Box<dyn Encoder>>,
    buffers: &mut Buffers,
) -> Result<Data> {
    let len = disks.block_len() * step.blocks as usize;
    let at = u64::from(step.block) * disks.block;
    buffers.new.resize(len, 0);
    disks.new.read_at(&mut buffers.new, at)?;
    let Some(encoder) = encoder else {
        let bytes = buffers.new.clone();
        return Ok(Data {
            is_difference: false,
            bytes,
        });
    };
    buffers.out.resize(len, 0);
    let mut best: Option<Data> = None;
    if step.make == Make::Differ {
        buffers.old.resize(len, 0);
        disks.old.read_at(&mut buffers.old, at)?;
        for (old, new) in buffers.old.iter_mut().zip(&buffers.new) {
            *old ^= new;
        }
        best = encoder
            .encode(&buffers.old, &mut buffers.out)?
            .map(|len| Data {
                is_difference: true,
                bytes: buffers.out[..len].to_vec(),
            });
    }
    let plain = encoder.encode(&buffers.new, &mut buffers.out)?;
    let is_less = |len: usize| {
        best.as_ref()
            .is_none_or(|best| len64(len) < len64(best.bytes.len()))
    };
    if let Some(len) = plain.filter(|len| is_less(*len)) {
        best = Some(Data {
            is_difference: false,
            bytes: buffers.out[..len].to_vec(),
        });
    }
    match best {
        Some(best) => Ok(best),
        None => Ok(Data {
            is_difference: false,
            bytes: plan.stubborn(&buffers.new)?,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_blocks_are_joined_to_powers_of_two() {
        let step = |block, make| Step {
            block,
            blocks: 1,
            make,
        };
        let mut steps: Vec<Step> = (10..17).map(|b| step(b, Make::Store)).collect();
        steps.push(step(18, Make::Store));
        steps.push(step(19, Make::Zero));
        let lens = |most| -> Vec<(u32, u32)> {
            let steps = joined(&steps, most);
            steps.iter().map(|s| (s.block, s.blocks)).collect()
        };
        assert_eq!(lens(4), [(10, 4), (14, 2), (16, 1), (18, 1), (19, 1)]);
        assert_eq!(lens(1).len(), 9);
    }
}
