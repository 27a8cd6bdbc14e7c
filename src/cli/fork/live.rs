//! A fork of an image that is served.
//!
//! All that takes time is done while clients write: the old file gets its other name, and the empty image
//! is made.  With requests held, and the old image closed, what is left is to look whether that is still
//! the image that the child was made over, and one rename.  The locks of the old file pass from who wrote
//! to it to who reads it, and nobody but us knows the new file before it has its name.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::UNIX_EPOCH;

use crate::chain::family::own;
use crate::chain::open::{ChainOptions, Follow, open, open_opened};
use crate::chain::{Chain, HostFile};
use crate::cli::fork::{Args, Fork, empty_over, named, taken};
use crate::cli::removed::parent;
use crate::cli::target::{Durable, Kept, Target};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::image::create::CreateBacking;
use crate::storage::HostId;
use crate::storage::open::{Access, open_file};

/// A fork that has begun; dropped, it leaves nothing behind.
pub(in crate::cli) struct Live<'a> {
    fork: Fork<'a>,
    /// The old file.
    old: File,
    target: Target,
    kept: Kept,
    /// What the child says of the image below it.
    described: CreateBacking,
}

/// A fork that is done.
#[derive(Debug)]
pub(in crate::cli) struct Forked {
    /// The child over its base.
    pub(in crate::cli) chain: Chain,
    /// Why it may not be on stable media.
    pub(in crate::cli) doubt: Option<Error>,
}

impl<'a> Live<'a> {
    /// Begins to fork the image that is open as `chain`; `None` where it is an empty image over NEW
    /// already.
    ///
    /// # Errors
    /// Those of [`super::run`], and what is not done while an image is in use: `Unsupported`, `ReadOnly`.
    pub(in crate::cli) fn begin(
        args: &'a Args,
        options: &ChainOptions,
        chain: &Chain,
    ) -> Result<Option<Self>> {
        let top = chain.top();
        if !top.caps().write {
            let text =
                "is open for reading only (allowed: 'vdtool fork', while nobody has it open)";
            return Err(Error::new(ErrorKind::ReadOnly, text).at(&args.file));
        }
        let options = ChainOptions {
            format: None,
            ..options.clone()
        };
        let fork = Fork::new(args, options)?;
        let id = top.storage().host_id();
        if HostId::named(&fork.file) != id || id.is_none() {
            let text = "was replaced while it was open";
            return Err(Error::new(ErrorKind::Io, text).at(&args.file));
        }
        if fork.is_over(chain)? {
            return Ok(None);
        }
        fork.refuse_moves(top)?;
        fork.refuse_children(chain)?;
        fork.refuse_linked(chain)?;
        // Not what the image is open as: a server of block devices has left the namespace of mounts in
        // which that was opened, and no name can be given to it here.
        let old = open_file(&fork.file, Access::Read)?;
        let target = Target::begin_over(&args.file, id)?;
        let kept = target.keep(old.as_fd(), &fork.new)?.ok_or_else(|| {
            let text = "is on a host without hard links (allowed: 'vdtool fork', while nobody has \
                        the image open)";
            Error::unsupported(text).at(&args.new)
        })?;
        let described = named(top, &fork.new, parent(&fork.file))?;
        empty_over(&target, top.driver(), described.clone())?;
        fork.refuse_unreachable(target.path(), &fork.new, &fork.file)?;
        target.sync()?;
        Ok(Some(Self {
            fork,
            old,
            target,
            kept,
            described,
        }))
    }

    /// Ends it: `old` is closed, and no request is under way.  The child is opened with `child`, what lies
    /// below it with `lower`; both are of the format of the old image.
    ///
    /// # Errors
    /// The host's; then FILE is the old file, and NEW is not there.
    pub(in crate::cli) fn finish(
        self,
        old: &Chain,
        child: &ChainOptions,
        lower: &ChainOptions,
    ) -> Result<Forked> {
        let Self {
            fork,
            old: file,
            target,
            kept,
            described,
        } = self;
        let top = old.top();
        let now = named(top, &fork.new, parent(&fork.file))?;
        if !is_same(&described, &now) {
            empty_over(&target, top.driver(), now)?;
        }
        let new = open_file(target.path(), Access::Write)?;
        let id = HostId::of_fd(&new);
        let chain = opened(new, &fork.args.file, top, child)?;
        let lower = ChainOptions {
            format: Some(top.driver()),
            ..lower.clone()
        };
        let chain = chain.over(open(&fork.new, &lower)?)?;
        target.refuse_replaced(file.as_fd())?;
        let placed = target.commit(Durable::Yes);
        match placed {
            Err(e) if HostId::named(&fork.file) != id => Err(e),
            placed => {
                kept.keep();
                let doubt = placed.err();
                Ok(Forked { chain, doubt })
            }
        }
    }
}

/// Opens the child alone.
fn opened(file: File, path: &Path, base: &dyn Image, options: &ChainOptions) -> Result<Chain> {
    let options = ChainOptions {
        format: Some(base.driver()),
        follow: Follow::Layers(1),
        ..options.clone()
    };
    open_opened(file, path, &options)
}

/// Whether a child made over one may lie over the other: times are kept in seconds.
fn is_same(before: &CreateBacking, now: &CreateBacking) -> bool {
    let seconds = |backing: &CreateBacking| {
        let since = backing.modified.duration_since(UNIX_EPOCH);
        since.map_or(0, |since| since.as_secs())
    };
    let all = |b: &CreateBacking| (b.identity, b.state, b.virtual_size, b.sector_size);
    seconds(before) == seconds(now) && all(before) == all(now)
}

impl Fork<'_> {
    /// Whether the image that is open as `chain` is an empty one over NEW already, and NEW is free
    /// otherwise, or its file by another name.
    fn is_over(&self, chain: &Chain) -> Result<bool> {
        let Some(id) = HostId::named(&self.new) else {
            return Ok(false);
        };
        let layer = |n: usize| chain.layers().get(n).and_then(|l| l.storage().host_id());
        if layer(0) == Some(id) {
            return Ok(false);
        }
        match layer(1) == Some(id) && own(chain.top())? == 0 {
            true => Ok(true),
            false => Err(taken(&self.args.new)),
        }
    }

    /// Refuses to have the file lie in another directory where its header would have to change.
    fn refuse_moves(&self, top: &dyn Image) -> Result<()> {
        let moves = parent(&self.new) != parent(&self.file);
        let names = top.backing().map(|backing| backing.names);
        let has_names = names.is_some_and(|names| !names.is_empty());
        if moves && (has_names || top.parts().len() > 1) {
            let text = format!(
                "names other files, which it would not find from {} (allowed: a name in its own \
                 directory, or 'vdtool fork', while nobody has it open)",
                parent(&self.new).display()
            );
            return Err(Error::unsupported(text).at(&self.args.file));
        }
        Ok(())
    }
}

/// The files of a chain, for [`ChainOptions::ours`].
pub(in crate::cli) fn ids(files: &[HostFile]) -> Vec<HostId> {
    files.iter().filter_map(|file| file.id).collect()
}
