//! What is refused before anything is moved, because an image would read otherwise afterwards.

use std::path::{Path, PathBuf};

use crate::chain;
use crate::chain::family::survey;
use crate::chain::open::{ChainOptions, Follow};
use crate::cli::commit::children::Plan;
use crate::cli::interrupt;
use crate::cli::removed::parent;
use crate::error::{Error, Result};
use crate::image::{Source, Wait};
use crate::storage::HostId;
use crate::util::align::{clamp_len, len64};
use crate::util::text::printable;

/// Bytes compared at a time.
const STEP: usize = 1 << 20;

impl Plan {
    /// Refuses what cannot be done without harm.
    ///
    /// # Errors
    /// `Invalid`, `Unsupported`, which name the image; those of the images.
    pub(in crate::cli) fn refuse(&self) -> Result<()> {
        self.refuse_strange()?;
        self.refuse_longer()?;
        self.refuse_others()?;
        self.refuse_unmerged()
    }

    /// Refuses what is no file or device of this host, and to remove what is no file.
    fn refuse_strange(&self) -> Result<()> {
        let children = self.waiting.iter().chain(&self.linked);
        let all = self.layers.iter().chain([&self.base]).chain(children);
        if let Some(node) = all.into_iter().find(|node| node.id.is_none()) {
            let text = "is not on this host (allowed: files and block devices)";
            return Err(Error::unsupported(text).at(&node.path));
        }
        let removed = self.layers.iter().filter(|_| self.wanted.remove);
        let files = removed.flat_map(|node| {
            let others = node.others.iter().map(|(path, _)| path);
            others.chain([&node.path])
        });
        for path in files {
            if !std::fs::metadata(path).is_ok_and(|found| found.is_file()) {
                let text = "is no file, which could be removed (allowed: without --remove)";
                return Err(Error::unsupported(text).at(path));
            }
        }
        Ok(())
    }

    /// Refuses a child that reads zeroes behind the end of FILE, and would read what the base has
    /// there.
    fn refuse_longer(&self) -> Result<()> {
        let Some(file) = self.layers.first() else {
            return Ok(());
        };
        let longer = |size: u64| size > file.size;
        match self.waiting.iter().find(|child| longer(child.size)) {
            Some(child) if longer(self.base.size) => {
                let text = format!(
                    "has {} bytes, {} below it {}, and would read what {} has behind them (allowed: a \
                     base that is no longer than FILE)",
                    child.size,
                    printable(&file.path),
                    file.size,
                    printable(&self.base.path)
                );
                Err(Error::invalid(text).at(&child.path))
            }
            _ => Ok(()),
        }
    }

    /// Refuses to leave an image over another disk than it was made over.
    pub(in crate::cli) fn refuse_others(&self) -> Result<()> {
        let nodes = || self.layers.iter().chain([&self.base]);
        // Of the children too: images name what lies below them, in their directory or further down.
        let around = nodes().chain(&self.waiting).chain(&self.linked);
        let mut places: Vec<PathBuf> = around.map(|n| parent(&n.path).to_owned()).collect();
        places.sort();
        places.dedup();
        let family = survey(&places, &self.look, &interrupt::check)?;
        let known = nodes().chain(&self.waiting).chain(&self.linked);
        let known: Vec<Option<HostId>> = known.map(|n| n.id).collect();
        for node in nodes() {
            let Some(id) = node.id else {
                continue;
            };
            let mut above = family.above(id).into_iter();
            if let Some(other) = above.find(|member| !known.contains(&member.id())) {
                let text = format!(
                    "lies below {} too, which would read otherwise (--children names images that have \
                     FILE below them; allowed: no others)",
                    printable(other.info.path.as_deref().unwrap_or(Path::new("")))
                );
                return Err(Error::invalid(text).at(&node.path));
            }
        }
        Ok(())
    }

    /// Where a child has the base below it already: refuses it unless the base has all that FILE and the
    /// images between have, as after a run that was killed.  It would be another disk otherwise, or
    /// FILE would go unmerged.
    fn refuse_unmerged(&self) -> Result<()> {
        let (Some(child), false) = (self.linked.first(), self.layers.is_empty()) else {
            return Ok(());
        };
        let upper = ChainOptions {
            follow: Follow::Layers(self.layers.len()),
            ..self.look.clone()
        };
        let upper = chain::open::open(&self.wanted.file, &upper)?;
        let base = ChainOptions {
            format: Some(self.base.driver),
            parents: Vec::new(),
            ..self.look.clone()
        };
        let base = chain::open::open(&self.base.path, &base)?;
        let (mut a, mut b) = (vec![0; STEP], vec![0; STEP]);
        let (mut at, end) = (0, upper.virtual_size());
        while at < end {
            interrupt::check()?;
            let found = upper.resolve_layers(at, end - at, Wait::Yes)?;
            if matches!(found.source, Source::Below) {
                at += found.len;
                continue;
            }
            let len = clamp_len(found.len, STEP);
            let (a, b) = (&mut a[..len], &mut b[..len]);
            match found.source {
                Source::Zero => a.fill(0),
                _ => upper.read_at(a, at)?,
            }
            let reaches = at + len64(len) <= base.virtual_size();
            if reaches {
                base.read_at(b, at)?;
            }
            if !reaches || a != b {
                let text = format!(
                    "has {} below it, which does not have what {} has (allowed as a child: an image \
                     that has that below it)",
                    printable(&self.base.path),
                    printable(&self.wanted.file)
                );
                return Err(Error::invalid(text).at(&child.path));
            }
            at += len64(len);
        }
        Ok(())
    }
}
