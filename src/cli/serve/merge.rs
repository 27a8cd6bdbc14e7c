//! `ctl commit`: layers below the top of a disk in use go into one below them.
//!
//! The disk is opened anew, in one short pause, so that the base is written to by the same image that
//! clients read through.  A thread then moves what the layers between have, which hide it until the end; in
//! a second pause the top image is given the base to lie over, by one change of its header.  Wherever it
//! ends before, all images read as they did, and `commit --children`, or another `ctl commit`, does it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};

use super::disk::Disk;
use super::event::Events;
use super::fork::refuse_temporary;
use super::job::{Control, State};
use super::run::Front;
use crate::backend::Medium;
use crate::chain::open::{ChainOptions, Live, open_live};
use crate::chain::{Chain, HostFile};
use crate::cli::commit::{Plan, Wanted, link, relinks};
use crate::cli::fork::ids;
use crate::cli::reach::{has_names, refuse_unreachable};
use crate::copy::{commit_part, part_size};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Role;
use crate::output::json::path as json_path;
use crate::storage::HostId;
use crate::storage::open::{open_for_writing_too, reads_again};
use crate::util::text::printable;

/// How often a merge that wants to end looks whether it may.
const LOOK: Duration = Duration::from_millis(20);

/// A merge, while it is under way and after.
#[derive(Debug)]
pub(super) struct Merge {
    base: PathBuf,
    control: Arc<Control>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// The base as it is open for writing; `None`: no longer.
    open: Arc<Mutex<Option<Arc<Chain>>>>,
}

impl Merge {
    /// Whether it may go on.
    fn is_open(&self) -> bool {
        self.open.lock().is_some()
    }

    /// What there is to know of it.
    pub(super) fn status(&self) -> Value {
        let mut status = self.control.status();
        status["base"] = json_path(&self.base).into();
        status
    }

    /// Has it stop where it is, and returns at once.
    pub(super) fn stop(&self) {
        self.control.stop();
    }

    /// Has it stop, and waits until it has.
    pub(super) fn end(&self) {
        self.stop();
        if let Some(thread) = self.thread.lock().take() {
            // A panic has been told by the thread itself.
            let _ = thread.join();
        }
    }

    /// Closes the base, once nobody reads the disk any more.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn close(&self) -> Result<()> {
        match self.open.lock().take() {
            Some(base) => base.close(),
            None => Ok(()),
        }
    }
}

/// Refuses what cannot be done while layers are merged.
///
/// # Errors
/// `Invalid`.
pub(super) fn refuse_under_way(disk: &Disk) -> Result<()> {
    match &*disk.merge.lock() {
        Some(merge) if merge.is_open() => {
            let text = format!(
                "layers of the disk are being merged into {} (allowed: when that is done, or after \
                 'ctl reopen', which ends it)",
                printable(&merge.base)
            );
            Err(Error::invalid(text))
        }
        _ => Ok(()),
    }
}

/// Holds the merge, or lets it go on.
///
/// # Errors
/// `NotFound` where there is none; `Invalid` where it has failed and is to be held.
pub(super) fn hold(disk: &Disk, holds: bool) -> anyhow::Result<Value> {
    let merge = disk.merge.lock().clone().filter(|merge| merge.is_open());
    let Some(merge) = merge else {
        let text = "no layers of the disk are being merged";
        return Err(Error::new(ErrorKind::NotFound, text).into());
    };
    match holds {
        true => merge.control.pause()?,
        false => merge.control.resume(),
    }
    Ok(merge.status())
}

/// Starts to merge.
///
/// # Errors
/// Those of `commit --children` before anything is moved; `Unsupported`, `ReadOnly`.
pub(super) fn start(
    front: &Front,
    disk: &Arc<Disk>,
    base: Option<(OsString, PathBuf)>,
) -> anyhow::Result<Value> {
    let _turn = disk.turn.lock();
    refuse_temporary(disk)?;
    refuse_under_way(disk)?;
    let chain = disk.export.backend.chain();
    let job = Job::plan(disk, &chain, base)?;
    let locks = lock_base(&chain, job.depth())?;
    let ours = ids(&chain.files());
    let begun = job.begin(disk, chain, &ours);
    if begun.is_err() {
        // Nor has the disk been opened anew, perhaps.
        let chain = disk.export.backend.chain();
        let parts = chain.layers().get(job.depth()).map(|layer| layer.parts());
        let mut parts = parts.into_iter().flatten();
        parts.try_for_each(|part| reads_again(part.storage))?;
    }
    drop(locks);
    let (upper, base) = begun?;
    let base = Arc::new(base);
    let told = Told {
        control: Arc::new(Control::new(
            upper.virtual_size(),
            Arc::clone(&disk.export.backend),
        )),
        events: front.events.clone(),
        export: disk.export.name.clone(),
        base: job.plan.base.path.clone(),
    };
    let merge = Arc::new(Merge {
        base: told.base.clone(),
        control: Arc::clone(&told.control),
        thread: Mutex::new(None),
        open: Arc::new(Mutex::new(Some(Arc::clone(&base)))),
    });
    *disk.merge.lock() = Some(Arc::clone(&merge));
    told.tell();
    let run = Run {
        disk: Arc::clone(disk),
        job,
        upper,
        base,
        open: Arc::clone(&merge.open),
        told,
    };
    let thread = thread::Builder::new().name("merge".to_owned());
    let thread = thread.spawn(move || run.run());
    let thread = thread.map_err(|e| Error::io("start a thread", e))?;
    *merge.thread.lock() = Some(thread);
    Ok(merge.status())
}

/// Takes the locks of a writer for the layer at `depth`, which is read.
fn lock_base(chain: &Chain, depth: usize) -> Result<Vec<std::fs::File>> {
    let parts = chain.layers()[depth].parts();
    let mut locks = Vec::new();
    for part in &parts {
        match open_for_writing_too(part.storage) {
            Ok(file) => locks.push(file),
            Err(e) => {
                let taken = parts.iter().take(locks.len());
                taken.for_each(|part| drop(reads_again(part.storage)));
                return Err(e);
            }
        }
    }
    Ok(locks)
}

/// What is to be merged.
struct Job {
    plan: Plan,
    file: PathBuf,
    target: HostFile,
}

impl Job {
    fn plan(disk: &Disk, chain: &Chain, base: Option<(OsString, PathBuf)>) -> anyhow::Result<Self> {
        let (file, _) = disk.image.lock().clone();
        let top = chain.top().storage();
        if !chain.top().caps().write {
            let text = "is open for reading only (allowed: 'vdtool commit --children', while nobody \
                        has it open)";
            return Err(Error::new(ErrorKind::ReadOnly, text).at(&file).into());
        }
        if top.host_id().is_none() || HostId::named(&file) != top.host_id() {
            let text = "was replaced while it was open";
            return Err(Error::new(ErrorKind::Io, text).at(&file).into());
        }
        let highest = chain.layers().get(1).filter(|_| chain.layers().len() > 2);
        let Some(highest) = highest else {
            let text = "has no two images below it, one of which could go into the other";
            return Err(Error::invalid(text).at(&file).into());
        };
        let mut options = disk.opener.reading(&file, &[]);
        options.format = Some(highest.driver());
        options.values.clear();
        let plan = Plan::new(Wanted {
            file: highest.storage().path().unwrap_or(Path::new("")).to_owned(),
            base: base.map(|(called, path)| match is_called(chain, &called) {
                true => called,
                false => path.into(),
            }),
            children: vec![file.clone()],
            remove: false,
            options,
        })?;
        plan.refuse()?;
        let target =
            find(chain, &plan).ok_or_else(|| Error::invalid("has changed meanwhile").at(&file))?;
        Ok(Self { plan, file, target })
    }

    /// The base's place in the chain.
    fn depth(&self) -> usize {
        self.target.layer
    }

    /// Has the disk go on with the base open for writing; the layers above it and those from it on.
    fn begin(&self, disk: &Disk, chain: Arc<Chain>, ours: &[HostId]) -> Result<(Chain, Chain)> {
        drop(chain);
        let backend = &disk.export.backend;
        // So that little is left to do while requests wait.
        backend.flush()?;
        let (file, format) = (&self.file, disk.image.lock().1);
        let (options, high_water) = disk.opener.watched(file, Some(format), ours);
        let mut parts = None;
        let next = |_: &Chain| {
            let live = self.open(&options)?;
            parts = Some((live.upper, live.base));
            Ok(Medium {
                chain: live.disk,
                high_water: Some(high_water),
            })
        };
        let back = || disk.opener.open_ours(file, Some(format), ours);
        backend.replace(next, back)?;
        parts.ok_or_else(|| Error::invalid("is not open").at(file))
    }

    fn open(&self, options: &ChainOptions) -> Result<Live> {
        let mut live = open_live(&self.file, options, &self.target)?;
        if let Some(child) = self.plan.waiting.first() {
            let has_names = has_names(live.disk.top());
            refuse_unreachable(
                has_names,
                &self.plan.base.path,
                &child.path,
                &options.references,
            )?;
            let backing = self.plan.backing(&live.base, child)?;
            let may = relinks(&mut live.disk).and_then(|relink| relink.may_relink(Some(&backing)));
            may.map_err(|e| e.at(&child.path))?;
        }
        // What the image above it has recorded stays right.
        live.base.top().keep_state();
        let size = live.upper.virtual_size();
        if live.base.virtual_size() < size {
            live.base.resize(size)?;
        }
        Ok(live)
    }

    /// Refuses a top that would read what the base has behind the end of the image between: either may
    /// have grown.
    fn refuse_longer(&self, top: u64, base: u64) -> Result<()> {
        let between = self.plan.layers.first().map_or(0, |layer| layer.size);
        match top > between && base > between {
            true => {
                let text = format!(
                    "has {top} bytes by now, and would read what {} has behind the {between} of the \
                     image between",
                    printable(&self.plan.base.path)
                );
                Err(Error::invalid(text).at(&self.file))
            }
            false => Ok(()),
        }
    }
}

/// Whether an image of the chain has this name for the one below it.
fn is_called(chain: &Chain, called: &OsString) -> bool {
    let mut backings = chain.layers().iter().skip(1).filter_map(|l| l.backing());
    backings.any(|backing| backing.names.iter().any(|name| name.path == *called))
}

/// The base in the chain that is open, where all images are those that the plan is for.
fn find(chain: &Chain, plan: &Plan) -> Option<HostFile> {
    let id = |layer: usize| chain.layers().get(layer)?.storage().host_id();
    let planned = plan
        .waiting
        .iter()
        .take(1)
        .chain(&plan.layers)
        .chain([&plan.base]);
    let planned: Vec<Option<HostId>> = planned.map(|node| node.id).collect();
    let are_same = planned
        .iter()
        .enumerate()
        .all(|(layer, planned)| planned.is_some() && id(layer) == *planned);
    let base = plan.layers.len() + 1;
    let mut files = chain.files().into_iter();
    let found = files.find(|file| file.layer == base && file.role == Role::Header);
    found.filter(|_| are_same && planned.len() == base + 1)
}

/// What the thread has.
struct Run {
    disk: Arc<Disk>,
    job: Job,
    upper: Chain,
    base: Arc<Chain>,
    open: Arc<Mutex<Option<Arc<Chain>>>>,
    told: Told,
}

impl Run {
    fn run(mut self) {
        let mut at = 0;
        loop {
            let done = self.move_all(&mut at).and_then(|()| self.go_over());
            let Err(e) = done else {
                return self.empty();
            };
            self.told.control.ended(State::Failed, Some(&e));
            if e.kind() != ErrorKind::Cancelled {
                self.told.tell();
            }
            let may_go_on = self.open.lock().is_some();
            if !may_go_on || !self.told.control.wait_resumed() {
                return;
            }
            self.told.tell();
        }
    }

    /// Moves the data, part by part from `at` on; what was moved needs not be moved again.
    fn move_all(&self, at: &mut u64) -> Result<()> {
        let control = &*self.told.control;
        let (size, part) = (self.upper.virtual_size(), part_size(&self.base));
        while *at < size {
            control.at(*at);
            let end = at.saturating_add(part).min(size);
            commit_part(&self.upper, &self.base, *at..end, 1, control)?;
            *at = end;
        }
        control.at(size);
        self.base.flush()
    }

    /// Has the top image lie over the base, and the disk go on so.
    fn go_over(&mut self) -> Result<()> {
        let disk = Arc::clone(&self.disk);
        let control = &self.told.control;
        let _turn = loop {
            control.look()?;
            if let Some(turn) = disk.turn.try_lock_for(LOOK) {
                break turn;
            }
        };
        let (file, format) = (self.job.file.clone(), disk.image.lock().1);
        let ours = ids(&disk.export.backend.chain().files());
        self.job.plan.look.ours.clone_from(&ours);
        // So that little is left to do while requests wait.
        disk.export.backend.flush()?;
        let again = || disk.opener.open_ours(&file, Some(format), &ours);
        let (job, base, open) = (&self.job, &self.base, &self.open);
        let next = |old: &Chain| {
            job.refuse_longer(old.virtual_size(), base.virtual_size())?;
            // From here on this merge does not go on, whatever happens.
            drop(open.lock().take());
            base.close()?;
            for child in &job.plan.waiting {
                let backing = job.plan.backing(base, child)?;
                let mut chain = job.plan.for_writing(child)?;
                link(&mut chain, &backing).map_err(|e| e.at(&child.path))?;
            }
            again()
        };
        disk.export.backend.replace(next, again)
    }

    /// Empties what nobody needs any more.
    fn empty(self) {
        let Self {
            mut job,
            upper,
            base,
            told,
            ..
        } = self;
        // Nothing of them is open here any more but the base, for reading.
        drop((upper, base));
        job.plan.look.ours.clear();
        let emptied = job.plan.refuse_others().and_then(|()| {
            let note = |text: &str| {
                let machine = json!({ "event": "note", "export": told.export, "text": text });
                told.events.print(text, &machine);
            };
            note("images that have these below them and lie in other directories are not known");
            job.plan.empty(&note)
        });
        told.control.ended(State::Done, emptied.err().as_ref());
        told.tell();
    }
}

/// Who is told how it goes.
struct Told {
    control: Arc<Control>,
    events: Events,
    export: String,
    base: PathBuf,
}

impl Told {
    fn tell(&self) {
        let mut machine = self.control.status();
        machine["event"] = "job".into();
        machine["export"] = (&*self.export).into();
        machine["base"] = json_path(&self.base).into();
        let state = machine["state"].as_str().unwrap_or_default();
        let why = machine["error"].as_str().map(|why| format!(": {why}"));
        let of = match &*self.export {
            "" => String::new(),
            name => format!("export '{name}': "),
        };
        let human = format!(
            "{of}commit into {}: {state}{}",
            printable(&self.base),
            why.unwrap_or_default()
        );
        self.events.print(&human, &machine);
    }
}
