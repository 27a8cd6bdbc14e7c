//! Images that are merged into their base in place, and say themselves how far that is.

use crate::chain::{self, HostFile};
use crate::cli::commit::Args;
use crate::cli::exit::{Exit, usage};
use crate::cli::{Globals, progress, signal};
use crate::copy;
use crate::error::Error;
use crate::storage::open::Access;
use crate::util::size;

/// Merges FILE into the image right below it, which is `target`.
pub(super) fn run(args: &Args, target: &HostFile, globals: &Globals) -> anyhow::Result<Exit> {
    if args.drop {
        return Err(usage("-d is not for an image that is merged in place"));
    }
    if target.layer != 1 {
        let text = "is merged into the image right below it (allowed for -b: that one)";
        return Err(Error::unsupported(text).at(&args.file).into());
    }
    if args.dry_run {
        let options = args
            .open
            .plan_cached(args.format, Access::Read, args.cache)?;
        let chain = chain::open::open(&args.file, &options)?;
        let left = chain.top().as_merge().map_or(0, |merge| merge.left());
        globals.say(&format!(
            "{} would be written into the base.",
            size::human(left)
        ))?;
        return Ok(Exit::Done);
    }
    let options = args
        .open
        .plan_cached(args.format, Access::Write, args.cache)?;
    let (upper, base) = chain::open::open_in_two(&args.file, &options, target)?;
    signal::catch()?;
    let left = upper.top().as_merge().map_or(0, |merge| merge.left());
    let bar = progress::start("commit", left, &args.progress, globals);
    let done = copy::merge(&upper, &base, &bar);
    if done.is_ok() {
        bar.finish();
    }
    let closed = base.close();
    done?;
    closed?;
    globals.say("Image committed.")?;
    Ok(Exit::Done)
}
