//! The layer below another: the one that the user gave, one that it names, or where it has no names
//! the one that has the identity it recorded.

use std::fmt::Write as _;
use std::path::Path;

use uuid::Uuid;

use crate::chain::MAX_LAYERS;
use crate::chain::open::{Changed, How, Layer, Walk, look};
use crate::chain::reference::search::{Candidate, Elsewhere, Looked, Passed, Wanted};
use crate::chain::reference::{Found, Namer, Trust};
use crate::error::{Error, ErrorKind, Result};
use crate::formats;
use crate::image::open::{Damaged, Purpose, WriteOrder};
use crate::image::{Backing, BackingName, Driver};
use crate::storage::HostId;
use crate::storage::open::{Access, StorageOptions};
use crate::util::text::printable;

impl<'a> Walk<'a> {
    /// Opens the layer below the last, which must be the image meant.
    pub(super) fn below(&mut self, backing: &Backing, access: Access) -> Result<Layer> {
        let Some(above) = self.layers.last().map(|l| l.namer.clone()) else {
            return Err(Error::invalid("a chain has at least one layer"));
        };
        if self.layers.len() >= MAX_LAYERS {
            let text = format!("is layer {MAX_LAYERS} and names another (allowed: {MAX_LAYERS})");
            return Err(Error::new(ErrorKind::OutOfRange, text).at(&above.path));
        }
        let format = self.backing_format(backing, &above)?;
        let how = self.how(format, above.trust, access);
        let given = (self.layers.len() - 1).checked_sub(self.options.followed);
        if let Some(given) = given.and_then(|index| self.options.parents.get(index)) {
            return self.given(&above, given, backing, &how);
        }
        if let Some(layer) = self.named(&above, backing, &how)? {
            return Ok(layer);
        }
        match (backing.identity, how.format) {
            // Where a name is recorded, what else has the identity may be a copy.
            (Some(identity), Some(driver)) if backing.names.is_empty() => {
                let wanted = Wanted {
                    driver,
                    identity,
                    state: backing.state,
                };
                self.identified(&above, backing, wanted, &how)
            }
            _ => Err(missing(&above, backing)),
        }
    }

    fn how(&self, format: Option<&'static Driver>, trust: Trust, access: Access) -> How<'a> {
        let top = self.layers.first().map(|l| l.image.driver());
        // What is written to is opened as the top is.
        let is_alike = access == Access::Write && format == top;
        How {
            storage: StorageOptions {
                access,
                ..self.options.storage
            },
            format,
            stated: trust,
            probed: Trust::None,
            order: WriteOrder::default(),
            purpose: match self.options.purpose {
                Purpose::Describe => Purpose::Describe,
                Purpose::Use | Purpose::Check => Purpose::Use,
            },
            damaged: Damaged::Refuse,
            snapshot: None,
            member: None,
            files: &[],
            values: match is_alike {
                true => &self.options.values,
                false => &[],
            },
            high_water: None,
        }
    }

    fn backing_format(&self, backing: &Backing, above: &Namer) -> Result<Option<&'static Driver>> {
        let Some(name) = &backing.format else {
            return Ok(self.options.backing_format);
        };
        let refused = |e: Error| {
            let text = format!(
                "says that its backing file is of format '{}': {e}",
                printable(name)
            );
            Error::unsupported(text).at(&above.path)
        };
        formats::named(name).map_err(refused).map(Some)
    }

    /// Opens what the user said lies below.
    fn given(&self, above: &Namer, path: &Path, backing: &Backing, how: &How<'_>) -> Result<Layer> {
        let note = |e: Error| match e.path() == Some(&above.path) {
            true => e,
            false => e.noted(format_args!(
                "given as the parent of {}",
                printable(&above.path)
            )),
        };
        let found = look(path, how.storage.access).map_err(note)?;
        let said = format!("was given {} as its parent", printable(path));
        self.refuse_cycle(above, &found, &said)?;
        let layer = self.layer(found, how).map_err(note)?;
        self.meant(above, layer, backing, &said)
    }

    /// Opens the first of its names that is there and is the image meant; `None` where none leads
    /// anywhere.
    fn named(&self, above: &Namer, backing: &Backing, how: &How<'_>) -> Result<Option<Layer>> {
        let mut refusal: Option<Error> = None;
        for name in &backing.names {
            let found = self
                .candidate(above, name, backing, how)
                .map_err(|e| above.blamed(e, &name.path, "backing file", &printable(&name.origin)));
            match found {
                Ok(layer) => return Ok(Some(layer)),
                Err(e) if is_missing(&e) => {}
                // What is there but wrong says more than what may not be looked at.
                Err(e) => match &refusal {
                    Some(first) if first.kind() != ErrorKind::Denied => {}
                    _ => refusal = Some(e),
                },
            }
        }
        refusal.map_or(Ok(None), Err)
    }

    /// Opens what one name leads to.
    fn candidate(
        &self,
        above: &Namer,
        name: &BackingName,
        backing: &Backing,
        how: &How<'_>,
    ) -> Result<Layer> {
        let (references, remotes) = (&self.options.references, &self.options.remotes);
        let (name, access) = (&*name.path, how.storage.access);
        let found = above.open(name, "backing file", access, references, remotes)?;
        let said = format!("names '{}' as its backing file", printable(name));
        self.refuse_cycle(above, &found, &said)?;
        let layer = self.layer(found, how)?;
        self.meant(above, layer, backing, &said)
    }

    /// Opens the image that has the identity wanted, where it is looked for.
    fn identified(
        &mut self,
        above: &Namer,
        backing: &Backing,
        wanted: Wanted,
        how: &How<'_>,
    ) -> Result<Layer> {
        let looked = self.search.find(above, &self.options.references, wanted)?;
        let in_chain = |image: &Candidate| self.layers.iter().any(|l| l.namer.id == Some(image.id));
        let (own, found): (Vec<_>, Vec<_>) = looked.found.iter().partition(|i| in_chain(i));
        let said = |image: &Candidate| {
            format!(
                "{} has the UUID of its backing file",
                printable(&image.path)
            )
        };
        match (&*found, &*own) {
            ([image], _) => {
                let found = Found::File {
                    file: image.open(how.storage.access)?,
                    path: image.path.clone(),
                };
                let layer = self.layer(found, how)?;
                self.meant(above, layer, backing, &said(image))
            }
            ([one, other, ..], _) => {
                let text = format!(
                    "{} files have the UUID {} of its backing file, {} and {} among them \
                     (--parent says which it is)",
                    found.len(),
                    wanted.identity,
                    printable(&one.path),
                    printable(&other.path)
                );
                Err(Error::invalid(text).at(&above.path))
            }
            ([], [image, ..]) => {
                let text = format!(
                    "{}: a cycle, since that is in the chain above it",
                    said(image)
                );
                Err(Error::corrupt(text).at(&above.path))
            }
            ([], []) => Err(not_found(above, wanted.identity, &looked)),
        }
    }

    /// Refuses a layer that is in the chain already.
    fn refuse_cycle(&self, above: &Namer, found: &Found, said: &str) -> Result<()> {
        let is_same: Box<dyn Fn(&Namer) -> bool> = match found {
            Found::File { file, .. } => {
                let id = HostId::of_fd(file);
                Box::new(move |namer| namer.id.is_some() && namer.id == id)
            }
            Found::Remote { uri } => Box::new(move |namer| namer.path == *uri),
        };
        match self.layers.iter().find(|l| is_same(&l.namer)) {
            None => Ok(()),
            Some(same) => {
                let text = format!(
                    "{said}: a cycle, since that is {}, above it in the chain",
                    printable(&same.namer.path)
                );
                Err(Error::corrupt(text).at(&above.path))
            }
        }
    }

    /// Refuses another image than the one that the image above was made over, and the same one in
    /// another state.
    fn meant(&self, above: &Namer, layer: Layer, backing: &Backing, said: &str) -> Result<Layer> {
        let shown = |uuid: Option<Uuid>| uuid.map_or("none".to_owned(), |uuid| uuid.to_string());
        let wrong = |text: String| Err(Error::corrupt(text).at(&above.path));
        if let Some(wanted) = backing.identity.filter(|uuid| !uuid.is_nil())
            && layer.image.identity() != Some(wanted)
        {
            return wrong(format!(
                "{said}, which is another image (its UUID is {}, expected {wanted})",
                shown(layer.image.identity())
            ));
        }
        let own = self.layers.last().map(|layer| &layer.image);
        let sectors = (
            own.and_then(|image| image.sector_size()),
            layer.image.sector_size(),
        );
        if let (Some(wanted), Some(found)) = sectors
            && wanted != found
        {
            return wrong(format!(
                "{said}, which has sectors of {found} bytes (allowed: {wanted}, as it has itself)"
            ));
        }
        let other = own.and_then(|image| image.other_state());
        if let Some(wanted) = backing.state
            && layer.image.state() != Some(wanted)
            && (other.is_none() || layer.image.state() != other)
            && self.options.changed == Changed::Refuse
        {
            return wrong(format!(
                "{said}, which was changed since (its state is {}, expected {wanted}; \
                 --parent-changed accept reads it as it is now)",
                shown(layer.image.state())
            ));
        }
        Ok(layer)
    }
}

/// Whether nothing is there, be it that a part of the way is no directory.
fn is_missing(error: &Error) -> bool {
    error.kind() == ErrorKind::NotFound || error.errno() == libc::ENOTDIR
}

/// The error for a backing file that no name leads to.
fn missing(above: &Namer, backing: &Backing) -> Error {
    let names: Vec<String> = backing
        .names
        .iter()
        .map(|n| format!("'{}' ({})", printable(&n.path), printable(&n.origin)))
        .collect();
    let text = match names.is_empty() {
        true => {
            "has a backing file, but neither a name nor an identity of it (--parent says which \
                 it is)"
                .to_owned()
        }
        false => format!(
            "its backing file is not there (looked for {}); --parent says where it is",
            names.join(", ")
        ),
    };
    Error::new(ErrorKind::NotFound, text).at(&above.path)
}

/// Names of files that are told at most.
const MAX_TOLD: usize = 3;

/// The error for a backing file that no image looked at is.
fn not_found(above: &Namer, identity: Uuid, looked: &Looked) -> Error {
    let mut text = format!(
        "its backing file is not there (looked for the UUID {identity} in {} files",
        looked.files
    );
    for (index, directory) in looked.directories.iter().enumerate() {
        let joined = if index == 0 { " in" } else { "," };
        let _ = write!(text, "{joined} {}", printable(directory));
    }
    if looked.is_cut {
        text.push_str(", which are as many as are looked at");
    }
    for (index, passed) in looked.passed.iter().take(MAX_TOLD).enumerate() {
        let joined = if index == 0 { "; not looked at:" } else { "," };
        let Passed { path, why } = passed;
        let _ = write!(text, "{joined} {} ({why})", printable(path));
    }
    match looked.passed.len().saturating_sub(MAX_TOLD) {
        0 => {}
        more => {
            let _ = write!(text, " and {more} more");
        }
    }
    match &looked.elsewhere {
        None => text.push_str("); --parent FILE says where it is"),
        Some(elsewhere) => text.push_str(&advice(elsewhere)),
    }
    Error::new(ErrorKind::NotFound, text).at(&above.path)
}

/// Where the parent of a child that VirtualBox made is likely to be.
fn advice(elsewhere: &Elsewhere) -> String {
    let Elsewhere { directory, names } = elsewhere;
    let shown = printable(directory);
    let paths = names.iter().take(MAX_TOLD);
    let paths: Vec<String> = paths.map(|name| printable(&directory.join(name))).collect();
    let more = match names.len().saturating_sub(MAX_TOLD) {
        0 => String::new(),
        more => format!(" or one of {more} more"),
    };
    let parent = match paths.is_empty() {
        true => "FILE".to_owned(),
        false => paths.join(" or "),
    };
    format!(
        "); VirtualBox keeps it in the directory above: --allow-ref {shown} has it looked for there, \
         --parent {parent}{more} says which it is"
    )
}
