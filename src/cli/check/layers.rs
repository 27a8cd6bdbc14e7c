//! All images of a chain, one by one.

use std::path::PathBuf;

use crate::chain::open::{ChainOptions, Follow};
use crate::chain::{self, Chain, MAX_LAYERS};
use crate::cli::check::{Args, Checked, add_below, check, verdict};
use crate::cli::common::{OutputFormat, print};
use crate::cli::exit::{self, Exit, complain};
use crate::cli::{Globals, interrupt};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Driver;
use crate::image::check::{Finding, Repair, Report, Severity};
use crate::image::open::Purpose;
use crate::output;
use crate::storage::HostId;
use crate::storage::open::Access;

/// One image of the chain, as it was found from the one above it.
struct Found {
    path: PathBuf,
    id: Option<HostId>,
    driver: &'static Driver,
    /// Bytes of its disk.
    size: u64,
}

/// Checks what lies below FILE, of which `top` tells; `options` are those it was opened with.
pub(super) fn run(
    args: &Args,
    globals: &Globals,
    options: &ChainOptions,
    top: Checked,
) -> anyhow::Result<Exit> {
    let (found, error) = find(args, options)?;
    let mut images = vec![(args.file.clone(), top)];
    for layer in found.iter().skip(1) {
        interrupt::check()?;
        images.push((layer.path.clone(), look(args, globals, options, layer)?));
    }
    for (pair, (_, checked)) in found.windows(2).zip(&mut images) {
        if let [own, below] = pair
            && below.size < own.size
        {
            let text = format!(
                "its disk has {} bytes, that of its backing image {}: zeroes are read behind them",
                own.size, below.size
            );
            checked.report.add(Severity::Note, 1, text, None);
        }
    }
    if let (Some(error), Some((_, last))) = (error, images.last_mut()) {
        add_below(error, &mut last.report);
    }
    let mut all = Report::default();
    for (_, Checked { report, .. }) in &images {
        all.corruptions += report.corruptions;
        all.leaks += report.leaks;
        all.check_errors += report.check_errors;
    }
    exit::answer(show(args, globals, &images), verdict(&all))
}

/// The images of the chain as far down as they can be opened, and what ends it before its base.
fn find(args: &Args, options: &ChainOptions) -> Result<(Vec<Found>, Option<Error>)> {
    let open = |follow| {
        let mut options = ChainOptions {
            follow,
            purpose: Purpose::Check,
            ..options.clone()
        };
        options.storage.access = Access::Read;
        chain::open::open(&args.file, &options)
    };
    let error = match open(Follow::Yes) {
        Ok(chain) => return Ok((Found::all(&chain), None)),
        Err(error) => error,
    };
    let (mut whole, mut broken) = (1, MAX_LAYERS + 1);
    while broken - whole > 1 {
        interrupt::check()?;
        let middle = whole.midpoint(broken);
        match open(Follow::Layers(middle)) {
            Ok(_) => whole = middle,
            Err(_) => broken = middle,
        }
    }
    Ok((Found::all(&open(Follow::Layers(whole))?), Some(error)))
}

impl Found {
    fn all(chain: &Chain) -> Vec<Self> {
        let layers = chain.layers().iter();
        let found = layers.map(|image| Self {
            path: image.storage().path().unwrap_or("".as_ref()).to_owned(),
            id: image.storage().host_id(),
            driver: image.driver(),
            size: image.virtual_size(),
        });
        found.collect()
    }
}

/// Checks an image below FILE; what cannot be read is a finding.
fn look(args: &Args, globals: &Globals, options: &ChainOptions, layer: &Found) -> Result<Checked> {
    let mut own = ChainOptions {
        storage: options.storage,
        format: Some(layer.driver),
        follow: Follow::Layers(1),
        purpose: Purpose::Check,
        references: options.references.clone(),
        remotes: options.remotes.clone(),
        ..ChainOptions::default()
    };
    own.storage.access = Access::Read;
    let mut report = Report::default();
    let named = HostId::named(&layer.path);
    let checked = match layer.id == named || layer.id.is_none() {
        true => check(args, &layer.path, &own, Repair::Nothing, globals),
        false => Err(Error::new(ErrorKind::Io, "was replaced meanwhile").at(&layer.path)),
    };
    match checked {
        Ok(checked) => return Ok(checked),
        Err(e) if e.kind() == ErrorKind::Cancelled => return Err(e),
        Err(e) if e.kind() == ErrorKind::Unsupported => {
            report.add(Severity::Note, 1, e.message().to_owned(), None);
        }
        Err(e) => {
            report.add(Severity::Note, 1, super::whole(e), None);
            report.check_errors += 1;
        }
    }
    Ok(Checked {
        report,
        format: layer.driver.name,
        has_backing: false,
    })
}

fn show(args: &Args, globals: &Globals, images: &[(PathBuf, Checked)]) -> anyhow::Result<()> {
    match args.output.output {
        OutputFormat::Json => print(|out| {
            let images = images
                .iter()
                .map(|(path, image)| output::check::value(path, image.format, &image.report));
            let images: Vec<_> = images.collect();
            Ok(output::check::json_chain(out, &images)?)
        }),
        OutputFormat::Human if globals.quiet => {
            let standing = |f: &&Finding| f.repaired.is_none() && f.severity != Severity::Note;
            for (path, image) in images {
                for finding in image.report.findings.iter().filter(standing) {
                    let line = output::check::line(finding);
                    complain(&format!("{}: {line}", crate::util::text::printable(path)));
                }
            }
            Ok(())
        }
        OutputFormat::Human => print(|out| {
            for (index, (path, image)) in images.iter().enumerate() {
                output::check::title(out, index, path)?;
                output::check::human(out, &image.report)?;
            }
            Ok(())
        }),
    }
}
