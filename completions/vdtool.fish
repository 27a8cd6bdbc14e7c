# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_vdtool_global_optspecs
    string join \n q/quiet h/help V/version
end

function __fish_vdtool_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_vdtool_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_vdtool_using_subcommand
    set -l cmd (__fish_vdtool_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c vdtool -n "__fish_vdtool_needs_command" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_needs_command" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_needs_command" -s V -l version -d 'Print version'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "create" -d 'Make a new image'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "info" -d 'Show what an image is'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "convert" -d 'Copy disks into a new image'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "check" -d 'Check an image\'s metadata, and repair it'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "compact" -d 'Give back the space that an image takes for nothing'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "chain" -d 'Show which images lie below which, and what is wrong between them'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "lint" -d 'Tell what of an image another place would refuse'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "map" -d 'List the extents of a disk'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "compare" -d 'Compare two disks'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "measure" -d 'Tell how large a converted image will be'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "resize" -d 'Change the size of a disk'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "snapshot" -d 'List, make, apply and delete internal snapshots'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "fork" -d 'Make a base of an image, with empty children over it'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "commit" -d 'Move what an image has into one below it'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "rebase" -d 'Give an image another backing image'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "bitmap" -d 'Add, remove, clear, merge, enable and disable dirty bitmaps'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "dirty" -d 'Make, show and change logs of which regions of a disk changed'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "amend" -d 'Change format options of an image in place'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "dd" -d 'Copy a part of a disk into a new image'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "bench" -d 'Measure how fast a disk is read or written'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "io" -d 'Read and write a disk\'s bytes by commands'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "serve" -d 'Serve disks until told to stop'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "ctl" -d 'Give commands to a running \'serve --control\''
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "completions" -d 'Print completions for a shell'
complete -c vdtool -n "__fish_vdtool_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c vdtool -n "__fish_vdtool_using_subcommand create" -s f -l format -d 'Format of the new image; without it the extension decides, else it is raw' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand create" -s o -l options -d 'Options of the format; "help" lists them' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand create" -s b -l backing -d 'Make an image that holds what differs from this one' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand create" -s F -l backing-format -d 'Format of the backing image; without it the content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand create" -l allow-ref -d 'Let the backing image name this file, or any file, as its own; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand create" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand create" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand create" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand create" -s u -l backing-unsafe -d 'Do not open the backing image: it need not exist, and SIZE and -F must be given'
complete -c vdtool -n "__fish_vdtool_using_subcommand create" -s U -l force-share -d 'Read the backing image even where another process has it open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand create" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand create" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand create" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand info" -s f -l format -d 'Format of the image; without it the content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand info" -l output -d 'How to print the result' -r -f -a "human\t'For people'
json\t'For programs; keys as qemu-img has them'"
complete -c vdtool -n "__fish_vdtool_using_subcommand info" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand info" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand info" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand info" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand info" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand info" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand info" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand info" -s b -l backing-chain -d 'Show the images below it as well, top first; otherwise no other than its own are opened'
complete -c vdtool -n "__fish_vdtool_using_subcommand info" -l ops -d 'Show the operations that the file consists of, one JSON line for each, in formats that have such'
complete -c vdtool -n "__fish_vdtool_using_subcommand info" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand info" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand info" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand info" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand info" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -s f -l format -d 'Format of the sources; without it their content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -s O -l target-format -d 'Format of the target; without it the extension decides, else it is raw' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l for -d 'Make what this place takes: sets the format and options of the target, before those of -o; lint tells what it takes' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -s o -l options -d 'Options of the target\'s format; "help" lists them' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -s B -l backing -d 'Make an image that holds what differs from this one' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -s F -l target-backing-format -d 'Format of the backing image of the target; without it its content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -s S -l sparse-size -d 'Leave out runs of zeroes of at least this size; 0: write everything, holes too [default: 4k]' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l dirty -d 'With -n: copy only what this log of changes names, or this list of ranges' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l dirty-bitmap -d 'With -n: copy only what this dirty bitmap of the source names, or of its server where it is an NBD URI' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -s l -l snapshot -d 'Convert an internal snapshot, in formats that have them' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -s j -l jobs -d 'Threads that work [default: one per core, at most 8]' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l ovf -d 'With -O ova: a descriptor of one\'s own; the sizes of its files are replaced' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -s r -l rate-limit -d 'Most bytes a second; 0: as many as there can be' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -s t -l target-cache -d 'How the page cache is used for the target' -r -f -a "writeback\t'The host\'s page cache; a flush makes writes durable'
writethrough\t'The host\'s page cache; every write is durable when it completes'
none\t'No page cache (`O_DIRECT`)'
directsync\t'No page cache, and every write is durable when it completes'
unsafe\t'The host\'s page cache; a flush does nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -s T -l source-cache -d 'How the page cache is used for the sources' -r -f -a "writeback\t'The host\'s page cache; a flush makes writes durable'
writethrough\t'The host\'s page cache; every write is durable when it completes'
none\t'No page cache (`O_DIRECT`)'
directsync\t'No page cache, and every write is durable when it completes'
unsafe\t'The host\'s page cache; a flush does nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l progress -d 'How to show progress, on stderr' -r -f -a "auto\t'A bar on a terminal, nothing elsewhere'
bar\t'A bar; where stderr is no terminal, lines of text'
json\t'One JSON object a line on stderr'
none\t'Nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -s c -l compress -d 'Compress the data, in formats that can'
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -s n -l no-create -d 'Write into an image or device that exists'
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l target-is-zero -d 'With -n: the target reads as zeroes already'
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -s W -l oob-writes -d 'Accepted: the layout of the target is in order all the same'
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -s C -l copy-range-offloading -d 'Accepted: data is always copied by the host where it can'
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l verify -d 'Read the new image back and compare it with the sources before it is put in place'
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l salvage -d 'Write zeroes for what cannot be read, say where, and go on'
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l no-manifest -d 'Do not compare the sources with the digests that a manifest has of them'
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l bitmaps -d 'Copy dirty bitmaps, in formats that have them'
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l skip-broken-bitmaps -d 'With --bitmaps: leave out those that a writer did not save'
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -s p -d 'Show a progress bar: the same as --progress bar'
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand convert" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand check" -s f -l format -d 'Format of the image; without it the content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand check" -s r -l repair -d 'Repair what is found' -r -f -a "leaks\t'Leaks only: metadata that data depends on is not touched'
all\t'Everything that can be repaired without losing data'"
complete -c vdtool -n "__fish_vdtool_using_subcommand check" -s T -l cache -d 'How the page cache is used' -r -f -a "writeback\t'The host\'s page cache; a flush makes writes durable'
writethrough\t'The host\'s page cache; every write is durable when it completes'
none\t'No page cache (`O_DIRECT`)'
directsync\t'No page cache, and every write is durable when it completes'
unsafe\t'The host\'s page cache; a flush does nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand check" -l output -d 'How to print the result' -r -f -a "human\t'For people'
json\t'For programs; keys as qemu-img has them'"
complete -c vdtool -n "__fish_vdtool_using_subcommand check" -l progress -d 'How to show progress, on stderr' -r -f -a "auto\t'A bar on a terminal, nothing elsewhere'
bar\t'A bar; where stderr is no terminal, lines of text'
json\t'One JSON object a line on stderr'
none\t'Nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand check" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand check" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand check" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand check" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand check" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand check" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand check" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand check" -l chain -d 'Check all images below FILE too'
complete -c vdtool -n "__fish_vdtool_using_subcommand check" -s p -d 'Show a progress bar: the same as --progress bar'
complete -c vdtool -n "__fish_vdtool_using_subcommand check" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand check" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand check" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand check" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand check" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand compact" -s f -l format -d 'Format of the image; without it the content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand compact" -l output -d 'How to print the result' -r -f -a "human\t'For people'
json\t'For programs; keys as qemu-img has them'"
complete -c vdtool -n "__fish_vdtool_using_subcommand compact" -l progress -d 'How to show progress, on stderr' -r -f -a "auto\t'A bar on a terminal, nothing elsewhere'
bar\t'A bar; where stderr is no terminal, lines of text'
json\t'One JSON object a line on stderr'
none\t'Nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand compact" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand compact" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand compact" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand compact" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand compact" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand compact" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand compact" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand compact" -l no-scan -d 'Do not look for stored zeroes'
complete -c vdtool -n "__fish_vdtool_using_subcommand compact" -s n -l dry-run -d 'Say what could be given back, and change nothing'
complete -c vdtool -n "__fish_vdtool_using_subcommand compact" -s p -d 'Show a progress bar: the same as --progress bar'
complete -c vdtool -n "__fish_vdtool_using_subcommand compact" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand compact" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand compact" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand compact" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand compact" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand chain" -s f -l format -d 'Format of the files that are named; without it the content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand chain" -l output -d 'How to print the result' -r -f -a "human\t'For people'
json\t'For programs; keys as qemu-img has them'"
complete -c vdtool -n "__fish_vdtool_using_subcommand chain" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand chain" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand chain" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand chain" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand chain" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand chain" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand chain" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand chain" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand chain" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand chain" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand chain" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand chain" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand lint" -l for -d 'Where the image is to go' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand lint" -s f -l format -d 'Format of the image; without it the content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand lint" -l output -d 'How to print the result' -r -f -a "human\t'For people'
json\t'For programs; keys as qemu-img has them'"
complete -c vdtool -n "__fish_vdtool_using_subcommand lint" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand lint" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand lint" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand lint" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand lint" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand lint" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand lint" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand lint" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand lint" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand lint" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand lint" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand lint" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand map" -s f -l format -d 'Format of the image; without it the content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand map" -s s -l start-offset -d 'First byte of the disk to look at' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand map" -s l -l max-length -d 'How many bytes to look at; without it, all up to the end' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand map" -l output -d 'How to print the result' -r -f -a "human\t'For people'
json\t'For programs; keys as qemu-img has them'"
complete -c vdtool -n "__fish_vdtool_using_subcommand map" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand map" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand map" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand map" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand map" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand map" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand map" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand map" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand map" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand map" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand map" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand map" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -s f -l format -d 'Format of the first image; without it the content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -s F -l second-format -d 'Format of the second image; without it the content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -s T -l cache -d 'How the page cache is used' -r -f -a "writeback\t'The host\'s page cache; a flush makes writes durable'
writethrough\t'The host\'s page cache; every write is durable when it completes'
none\t'No page cache (`O_DIRECT`)'
directsync\t'No page cache, and every write is durable when it completes'
unsafe\t'The host\'s page cache; a flush does nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -l output -d 'How to print the result' -r -f -a "human\t'For people'
json\t'For programs; keys as qemu-img has them'"
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -l progress -d 'How to show progress, on stderr' -r -f -a "auto\t'A bar on a terminal, nothing elsewhere'
bar\t'A bar; where stderr is no terminal, lines of text'
json\t'One JSON object a line on stderr'
none\t'Nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -s s -l strict -d 'Sizes must be equal too, and data, zeroes and holes in the same places'
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -l no-manifest -d 'Do not compare the images with the digests that a manifest has of them'
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -s p -d 'Show a progress bar: the same as --progress bar'
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand compare" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand measure" -s f -l format -d 'Format of FILE; without it the content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand measure" -s O -l target-format -d 'Format of the new image [default: raw]' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand measure" -s o -l options -d 'Options of the new image\'s format; "help" lists them' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand measure" -s l -l snapshot -d 'Measure an internal snapshot, in formats that have them' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand measure" -s s -l size -d 'Size of a disk without data, instead of FILE' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand measure" -l output -d 'How to print the result' -r -f -a "human\t'For people'
json\t'For programs; keys as qemu-img has them'"
complete -c vdtool -n "__fish_vdtool_using_subcommand measure" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand measure" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand measure" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand measure" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand measure" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand measure" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand measure" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand measure" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand measure" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand measure" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand measure" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand measure" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand resize" -s f -l format -d 'Format of the image; without it the content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand resize" -l preallocation -d 'What to do about the space of new bytes' -r -f -a "off\t'Nothing'
metadata\t'Tables lead to it, in formats that have some'
falloc\t'It is allocated'
full\t'It is allocated and written with zeroes'"
complete -c vdtool -n "__fish_vdtool_using_subcommand resize" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand resize" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand resize" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand resize" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand resize" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand resize" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand resize" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand resize" -l shrink -d 'Allow a smaller size: what lies past it is lost'
complete -c vdtool -n "__fish_vdtool_using_subcommand resize" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand resize" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand resize" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand resize" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand resize" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand snapshot" -s f -l format -d 'Format of the image; without it the content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand snapshot" -s c -l create -d 'Make a snapshot of this name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand snapshot" -s a -l apply -d 'Make the disk what it was in the snapshot of this id or name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand snapshot" -s d -l delete -d 'Delete the first snapshot of this name or id' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand snapshot" -l output -d 'How to print the result' -r -f -a "human\t'For people'
json\t'For programs; keys as qemu-img has them'"
complete -c vdtool -n "__fish_vdtool_using_subcommand snapshot" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand snapshot" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand snapshot" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand snapshot" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand snapshot" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand snapshot" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand snapshot" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand snapshot" -s l -l list -d 'List the snapshots'
complete -c vdtool -n "__fish_vdtool_using_subcommand snapshot" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand snapshot" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand snapshot" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand snapshot" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand snapshot" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand fork" -s f -l format -d 'Format of the image; without it the content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand fork" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand fork" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand fork" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand fork" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand fork" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand fork" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand fork" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand fork" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand fork" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand fork" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand fork" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand fork" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -s f -l format -d 'Format of the image; without it the content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -s b -l base -d 'The image below FILE to commit into, by the name that the chain has for it, else by its path; without it, the one right below. Implies -d' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -l children -d 'An image that has FILE below it, and is to have BASE below it instead; repeatable, one for each. FILE may then lie in the middle of a chain' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -s t -l cache -d 'How the page cache is used' -r -f -a "writeback\t'The host\'s page cache; a flush makes writes durable'
writethrough\t'The host\'s page cache; every write is durable when it completes'
none\t'No page cache (`O_DIRECT`)'
directsync\t'No page cache, and every write is durable when it completes'
unsafe\t'The host\'s page cache; a flush does nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -l progress -d 'How to show progress, on stderr' -r -f -a "auto\t'A bar on a terminal, nothing elsewhere'
bar\t'A bar; where stderr is no terminal, lines of text'
json\t'One JSON object a line on stderr'
none\t'Nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -s d -l drop -d 'Leave the image as it is instead of emptying it'
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -l remove -d 'Remove FILE and the images between it and BASE, once all is on stable media'
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -s n -l dry-run -d 'Say what would be moved, and change nothing'
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -s p -d 'Show a progress bar: the same as --progress bar'
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand commit" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -s f -l format -d 'Format of the image; without it the content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -s b -l backing -d 'The new backing image; an empty name: none' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -s F -l new-backing-format -d 'Format of the new backing image; without it the content decides, with -u what FILE records' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -s t -l cache -d 'How the page cache is used for FILE' -r -f -a "writeback\t'The host\'s page cache; a flush makes writes durable'
writethrough\t'The host\'s page cache; every write is durable when it completes'
none\t'No page cache (`O_DIRECT`)'
directsync\t'No page cache, and every write is durable when it completes'
unsafe\t'The host\'s page cache; a flush does nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -s T -l backing-cache -d 'How the page cache is used for the backing images' -r -f -a "writeback\t'The host\'s page cache; a flush makes writes durable'
writethrough\t'The host\'s page cache; every write is durable when it completes'
none\t'No page cache (`O_DIRECT`)'
directsync\t'No page cache, and every write is durable when it completes'
unsafe\t'The host\'s page cache; a flush does nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -l progress -d 'How to show progress, on stderr' -r -f -a "auto\t'A bar on a terminal, nothing elsewhere'
bar\t'A bar; where stderr is no terminal, lines of text'
json\t'One JSON object a line on stderr'
none\t'Nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -s u -l unsafe -d 'Change the name only, and open neither backing image'
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -s c -l compress -d 'Compress what is copied, in formats that can'
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -s p -d 'Show a progress bar: the same as --progress bar'
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand rebase" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -s f -l format -d 'Format of the image; without it the content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -l merge -d 'Add what another bitmap has taken note of; repeatable' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -l merge-log -d 'Add what a log of changes has, or a list of ranges; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -s g -l granularity -d 'Bytes that one bit of a new bitmap stands for [default: the cluster size, at least 4k]' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -s b -l source-file -d 'Merge from a bitmap of this image' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -s F -l source-format -d 'Format of that image; without it its content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -l add -d 'Add it; it takes note of writes unless --disable is given too'
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -l remove -d 'Remove it'
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -l clear -d 'Forget what it has taken note of'
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -l enable -d 'Have it take note of writes'
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -l disable -d 'Have it take note of writes no more'
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand bitmap" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and not __fish_seen_subcommand_from create info dump set clear merge help" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and not __fish_seen_subcommand_from create info dump set clear merge help" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and not __fish_seen_subcommand_from create info dump set clear merge help" -f -a "create" -d 'Make a log in which nothing is marked'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and not __fish_seen_subcommand_from create info dump set clear merge help" -f -a "info" -d 'Show what a log is of, and how much is marked'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and not __fish_seen_subcommand_from create info dump set clear merge help" -f -a "dump" -d 'List the ranges that are marked'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and not __fish_seen_subcommand_from create info dump set clear merge help" -f -a "set" -d 'Mark all regions that a part of the disk touches'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and not __fish_seen_subcommand_from create info dump set clear merge help" -f -a "clear" -d 'Clear all regions that lie wholly in a part of the disk'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and not __fish_seen_subcommand_from create info dump set clear merge help" -f -a "merge" -d 'Mark in a log what is marked in others, whatever their regions are'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and not __fish_seen_subcommand_from create info dump set clear merge help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from create" -s f -l format -d 'Whose format the log is in' -r -f -a "vdtool\t'Our own'
mirr\t'device-mapper\'s disk log'
cbt\t'XenServer\'s changed block tracking'"
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from create" -s g -l granularity -d 'Bytes of a region, a power of two from 4k to 64M [default: 64k]' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from create" -l size -d 'Bytes of the disk' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from create" -l image -d 'The disk, from which its size and its identity are taken' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from create" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from create" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from create" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from create" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from create" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from create" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from create" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from create" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from create" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from create" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from create" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from create" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from info" -l output -d 'How to print the result' -r -f -a "human\t'For people'
json\t'For programs; keys as qemu-img has them'"
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from info" -s f -l format -d 'Format of the log; without it the content decides' -r -f -a "vdtool\t'Our own'
mirr\t'device-mapper\'s disk log'
cbt\t'XenServer\'s changed block tracking'"
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from info" -s g -l granularity -d 'Bytes of a region, where the log does not say so (mirr)' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from info" -l size -d 'Bytes of the disk, where the log does not say so (mirr)' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from info" -s U -l force-share -d 'Read even where another process has the log open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from info" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from info" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from dump" -l output -d 'How to print the result' -r -f -a "human\t'For people'
json\t'For programs; keys as qemu-img has them'"
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from dump" -s f -l format -d 'Format of the log; without it the content decides' -r -f -a "vdtool\t'Our own'
mirr\t'device-mapper\'s disk log'
cbt\t'XenServer\'s changed block tracking'"
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from dump" -s g -l granularity -d 'Bytes of a region, where the log does not say so (mirr)' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from dump" -l size -d 'Bytes of the disk, where the log does not say so (mirr)' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from dump" -s U -l force-share -d 'Read even where another process has the log open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from dump" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from dump" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from set" -s s -l start -d 'Its first byte' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from set" -s l -l length -d 'Its length' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from set" -s f -l format -d 'Format of the log; without it the content decides' -r -f -a "vdtool\t'Our own'
mirr\t'device-mapper\'s disk log'
cbt\t'XenServer\'s changed block tracking'"
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from set" -s g -l granularity -d 'Bytes of a region, where the log does not say so (mirr)' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from set" -l size -d 'Bytes of the disk, where the log does not say so (mirr)' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from set" -l all -d 'All of it'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from set" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from set" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from clear" -s s -l start -d 'Its first byte' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from clear" -s l -l length -d 'Its length' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from clear" -s f -l format -d 'Format of the log; without it the content decides' -r -f -a "vdtool\t'Our own'
mirr\t'device-mapper\'s disk log'
cbt\t'XenServer\'s changed block tracking'"
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from clear" -s g -l granularity -d 'Bytes of a region, where the log does not say so (mirr)' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from clear" -l size -d 'Bytes of the disk, where the log does not say so (mirr)' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from clear" -l all -d 'All of it'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from clear" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from clear" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from merge" -l bitmap -d 'The others are images, and this is their dirty bitmap to take' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from merge" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from merge" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from merge" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from merge" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from merge" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from merge" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from merge" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from merge" -s f -l format -d 'Format of the log; without it the content decides' -r -f -a "vdtool\t'Our own'
mirr\t'device-mapper\'s disk log'
cbt\t'XenServer\'s changed block tracking'"
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from merge" -s g -l granularity -d 'Bytes of a region, where the log does not say so (mirr)' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from merge" -l size -d 'Bytes of the disk, where the log does not say so (mirr)' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from merge" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from merge" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from merge" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from merge" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from merge" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from help" -f -a "create" -d 'Make a log in which nothing is marked'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from help" -f -a "info" -d 'Show what a log is of, and how much is marked'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from help" -f -a "dump" -d 'List the ranges that are marked'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from help" -f -a "set" -d 'Mark all regions that a part of the disk touches'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from help" -f -a "clear" -d 'Clear all regions that lie wholly in a part of the disk'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from help" -f -a "merge" -d 'Mark in a log what is marked in others, whatever their regions are'
complete -c vdtool -n "__fish_vdtool_using_subcommand dirty; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c vdtool -n "__fish_vdtool_using_subcommand amend" -s f -l format -d 'Format of the image; without it the content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand amend" -s o -l options -d 'The options to change; "help" lists those that can be' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand amend" -s t -l cache -d 'How the page cache is used' -r -f -a "writeback\t'The host\'s page cache; a flush makes writes durable'
writethrough\t'The host\'s page cache; every write is durable when it completes'
none\t'No page cache (`O_DIRECT`)'
directsync\t'No page cache, and every write is durable when it completes'
unsafe\t'The host\'s page cache; a flush does nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand amend" -l progress -d 'How to show progress, on stderr' -r -f -a "auto\t'A bar on a terminal, nothing elsewhere'
bar\t'A bar; where stderr is no terminal, lines of text'
json\t'One JSON object a line on stderr'
none\t'Nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand amend" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand amend" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand amend" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand amend" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand amend" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand amend" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand amend" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand amend" -l force -d 'Accepted for qemu-img\'s sake: it is about keys of encrypted images'
complete -c vdtool -n "__fish_vdtool_using_subcommand amend" -s p -d 'Show a progress bar: the same as --progress bar'
complete -c vdtool -n "__fish_vdtool_using_subcommand amend" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand amend" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand amend" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand amend" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand amend" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand dd" -s f -l format -d 'Format of INPUT; without it the content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dd" -s O -l output-format -d 'Format of OUTPUT; without it the extension decides, else it is raw' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dd" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand dd" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand dd" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand dd" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dd" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dd" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dd" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand dd" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand dd" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand dd" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand dd" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand dd" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -s f -l format -d 'Format of the image; without it the content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -s t -l cache -d 'How the page cache is used' -r -f -a "writeback\t'The host\'s page cache; a flush makes writes durable'
writethrough\t'The host\'s page cache; every write is durable when it completes'
none\t'No page cache (`O_DIRECT`)'
directsync\t'No page cache, and every write is durable when it completes'
unsafe\t'The host\'s page cache; a flush does nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -s c -l count -d 'Requests in all' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -s d -l depth -d 'Requests at a time' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -s o -l offset -d 'Where the first request starts' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -s s -l buffer-size -d 'Bytes of a request' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -s S -l step-size -d 'How far one request starts after another [default: their size]' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -s i -l aio -d 'Accepted for qemu-img\'s sake, without effect' -r -f -a "threads\t'By threads'
native\t'By the kernel\'s older interface'
io_uring\t'By the kernel\'s newer interface'"
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -l pattern -d 'With -w: the byte that is written, instead of 0' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -l flush-interval -d 'With -w: flush after so many requests' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -s n -l native -d 'Accepted for qemu-img\'s sake, without effect'
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -s w -l write -d 'Write instead of reading'
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -l no-drain -d 'Flush without waiting for the requests under way'
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand bench" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -s f -l format -d 'Format of FILE; left out: probed by content' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -s t -l cache -d 'Which caches are used' -r -f -a "writeback\t'The host\'s page cache; a flush makes writes durable'
writethrough\t'The host\'s page cache; every write is durable when it completes'
none\t'No page cache (`O_DIRECT`)'
directsync\t'No page cache, and every write is durable when it completes'
unsafe\t'The host\'s page cache; a flush does nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -s d -l discard -d 'What becomes of discards' -r -f -a "unmap\t'They give space back'
ignore\t'They do nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -s c -l cmd -d 'A command to run; repeatable' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -l script -d 'A file with a command on each line, blank lines and # comments; \'-\' is standard input' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -s i -l aio -d 'Accepted for qemu-io\'s sake, without effect' -r -f -a "threads\t'By threads'
native\t'By the kernel\'s older interface'
io_uring\t'By the kernel\'s newer interface'"
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -s r -l read-only -d 'Open for reading only'
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -s s -l snapshot -d 'Write to a temporary layer above the image, which is dropped at the end'
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -s n -l nocache -d 'Bypass the host\'s page cache: the same as -t none'
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -s C -l copy-on-read -d 'Write into the image what is read from those below it'
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -s m -l misalign -d 'Accepted for qemu-io\'s sake, without effect'
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -s k -l native-aio -d 'Accepted for qemu-io\'s sake, without effect'
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand io" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l nbd -d 'Serve NBD clients on a Unix socket, a TCP port, or the socket that a service manager hands over' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l name -d 'What clients of the one image that has no NAME= ask for' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l connections -d 'Most NBD clients at once; further ones are told so' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l bitmap -d 'Let NBD clients see this dirty bitmap of the images; repeatable' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l tls -d 'Require TLS, with server-cert.pem and server-key.pem in this directory' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l queues -d 'Queues, each with a thread of its own' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l depth -d 'Requests that a queue may have under way' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l dev-id -d 'The N of /dev/ublkbN' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l delete -d 'Remove a ublk device whose server was killed' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -s f -l format -d 'Format of the images; without it their content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l overlay -d 'Writes go to this image, made where it is not there, with FILE below it' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l cache -d 'Which caches are used' -r -f -a "writeback\t'The host\'s page cache; a flush makes writes durable'
writethrough\t'The host\'s page cache; every write is durable when it completes'
none\t'No page cache (`O_DIRECT`)'
directsync\t'No page cache, and every write is durable when it completes'
unsafe\t'The host\'s page cache; a flush does nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l discard -d 'What becomes of discards' -r -f -a "unmap\t'They give space back'
ignore\t'They do nothing'"
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l aio -d 'Accepted for qemu-nbd\'s sake, without effect' -r -f -a "threads\t'By threads'
native\t'By the kernel\'s older interface'
io_uring\t'By the kernel\'s newer interface'"
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l detect-zeroes -d 'What becomes of writes of zeroes' -r -f -a "off\t'They are written'
on\t'The range is zeroed, and keeps its space'
unmap\t'The range is zeroed, and may give its space back'"
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l on-read-error -d 'What is done when a read fails' -r -f -a "report\t'The client is told'
ignore\t'The client is told that it was done'
stop\t'All requests are held until `ctl resume`'
enospc\t'Stop when there is no space left, report anything else'"
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l on-write-error -d 'What is done when a write fails' -r -f -a "report\t'The client is told'
ignore\t'The client is told that it was done'
stop\t'All requests are held until `ctl resume`'
enospc\t'Stop when there is no space left, report anything else'"
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l limit -d 'Limits of each export, or of the one named; repeatable' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l logical-block-size -d 'Size of the blocks that requests are made of' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l physical-block-size -d 'Size of the blocks that clients should keep to' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l max-io -d 'Longest transfer that clients should ask for' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l watermark -d 'Tell, once, when something is written past this offset of an image\'s file' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l stats-interval -d 'Print statistics on standard error every so many seconds' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l control -d 'Take commands of `vdtool ctl` on this socket' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l ready-fd -d 'Write the addresses to this file descriptor too' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l pid-file -d 'Write the process id to this file while clients may use the exports' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l description -d 'What clients are told that the export is' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l output -d 'How to print the result' -r -f -a "human\t'For people'
json\t'For programs; keys as qemu-img has them'"
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l allow-ref -d 'Let images name this file, or any file, or this NBD URI, as backing file, or have parents be looked for by identity in this directory; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l parent -d 'What lies below the image, topmost first, whatever images name; repeatable' -r -F
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l parent-changed -d 'What to do about a parent that was changed since its child was made' -r -f -a "refuse\t'It is refused: the disk may be none that ever was'
accept\t'It is read as it is now'"
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l backing-format -d 'Format of a backing file whose format is not recorded' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l member -d 'Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l open-options -d 'Options of the image\'s format for opening it, such as size_rule=chs for vhd' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l object -d 'An object, such as a secret' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l persistent -d 'Go on after the last NBD client has left'
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l tls-verify-peer -d 'Take only clients with a certificate that ca-cert.pem, in the same directory, vouches for'
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l ublk -d 'Serve each image as a block device of this machine, /dev/ublkbN'
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l recover -d 'Take over the device --dev-id, whose server was killed'
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l no-recovery -d 'Let the device go when its server is killed, instead of waiting for another'
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l no-zero-copy -d 'Copy all bytes, even where the kernel need not'
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l no-batches -d 'Take and answer requests one by one, even where the kernel has batches'
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l unprivileged -d 'A device of a user without privileges'
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l list -d 'List the ublk devices of this machine'
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -s r -l read-only -d 'Take no writes'
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -s s -l snapshot -d 'Writes go to a temporary layer, and are lost at the end'
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -s U -l force-share -d 'Read even where another process has the image open for writing'
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l no-mmap -d 'Read by system calls, not through mappings'
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -l image-opts -d 'An image by options'
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand serve" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and not __fish_seen_subcommand_from status stats pause resume flush resize change reopen fork commit limit stop help" -l output -d 'How to print the result' -r -f -a "human\t'For people'
json\t'For programs; keys as qemu-img has them'"
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and not __fish_seen_subcommand_from status stats pause resume flush resize change reopen fork commit limit stop help" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and not __fish_seen_subcommand_from status stats pause resume flush resize change reopen fork commit limit stop help" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and not __fish_seen_subcommand_from status stats pause resume flush resize change reopen fork commit limit stop help" -a "status" -d 'What is served, and how it does'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and not __fish_seen_subcommand_from status stats pause resume flush resize change reopen fork commit limit stop help" -a "stats" -d 'What was done so far: requests, bytes, failures, latencies'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and not __fish_seen_subcommand_from status stats pause resume flush resize change reopen fork commit limit stop help" -a "pause" -d 'Hold requests, and return once none is under way'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and not __fish_seen_subcommand_from status stats pause resume flush resize change reopen fork commit limit stop help" -a "resume" -d 'Go on after a pause or an error, with the I/O status reset'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and not __fish_seen_subcommand_from status stats pause resume flush resize change reopen fork commit limit stop help" -a "flush" -d 'Make completed writes durable'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and not __fish_seen_subcommand_from status stats pause resume flush resize change reopen fork commit limit stop help" -a "resize" -d 'Change the size of a disk'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and not __fish_seen_subcommand_from status stats pause resume flush resize change reopen fork commit limit stop help" -a "change" -d 'Go on with another image'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and not __fish_seen_subcommand_from status stats pause resume flush resize change reopen fork commit limit stop help" -a "reopen" -d 'Close the image and open it again, after something else has changed it'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and not __fish_seen_subcommand_from status stats pause resume flush resize change reopen fork commit limit stop help" -a "fork" -d 'Go on with an empty image that has the name of the image, which becomes its base'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and not __fish_seen_subcommand_from status stats pause resume flush resize change reopen fork commit limit stop help" -a "commit" -d 'Merge the images below the top one into BASE, while the disk is used; \'pause\' and \'resume\' hold that and let it go on, after an error too'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and not __fish_seen_subcommand_from status stats pause resume flush resize change reopen fork commit limit stop help" -a "limit" -d 'Set other limits'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and not __fish_seen_subcommand_from status stats pause resume flush resize change reopen fork commit limit stop help" -a "stop" -d 'End serving: requests under way end, the images are flushed and closed'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and not __fish_seen_subcommand_from status stats pause resume flush resize change reopen fork commit limit stop help" -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from status" -l export -d 'The disk that clients call so' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from status" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from status" -s h -l help -d 'Print help'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from stats" -l export -d 'The disk that clients call so' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from stats" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from stats" -s h -l help -d 'Print help'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from pause" -l export -d 'The disk that clients call so' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from pause" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from pause" -s h -l help -d 'Print help'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from resume" -l export -d 'The disk that clients call so' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from resume" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from resume" -s h -l help -d 'Print help'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from flush" -l export -d 'The disk that clients call so' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from flush" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from flush" -s h -l help -d 'Print help'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from resize" -l export -d 'The disk that clients call so' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from resize" -l shrink -d 'Allow it to become smaller: what lies behind the new end is lost'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from resize" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from resize" -s h -l help -d 'Print help'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from change" -l export -d 'The disk that clients call so' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from change" -s f -l format -d 'Format of the image; without it its content decides' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from change" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from change" -s h -l help -d 'Print help'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from reopen" -l export -d 'The disk that clients call so' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from reopen" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from reopen" -s h -l help -d 'Print help'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from fork" -l export -d 'The disk that clients call so' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from fork" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from fork" -s h -l help -d 'Print help'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from commit" -l export -d 'The disk that clients call so' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from commit" -l called -d 'BASE as it was typed, where WHAT is its absolute path' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from commit" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from commit" -s h -l help -d 'Print help'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from limit" -l export -d 'The disk that clients call so' -r
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from limit" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from limit" -s h -l help -d 'Print help'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from stop" -l force -d 'End at once: the images are left as a kill leaves them'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from stop" -l hand-over -d 'Leave block devices waiting for the next server, serve --recover, which must come'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from stop" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from stop" -s h -l help -d 'Print help'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "status" -d 'What is served, and how it does'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "stats" -d 'What was done so far: requests, bytes, failures, latencies'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "pause" -d 'Hold requests, and return once none is under way'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "resume" -d 'Go on after a pause or an error, with the I/O status reset'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "flush" -d 'Make completed writes durable'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "resize" -d 'Change the size of a disk'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "change" -d 'Go on with another image'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "reopen" -d 'Close the image and open it again, after something else has changed it'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "fork" -d 'Go on with an empty image that has the name of the image, which becomes its base'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "commit" -d 'Merge the images below the top one into BASE, while the disk is used; \'pause\' and \'resume\' hold that and let it go on, after an error too'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "limit" -d 'Set other limits'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "stop" -d 'End serving: requests under way end, the images are flushed and closed'
complete -c vdtool -n "__fish_vdtool_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c vdtool -n "__fish_vdtool_using_subcommand completions" -s q -l quiet -d 'Print errors only'
complete -c vdtool -n "__fish_vdtool_using_subcommand completions" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "create" -d 'Make a new image'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "info" -d 'Show what an image is'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "convert" -d 'Copy disks into a new image'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "check" -d 'Check an image\'s metadata, and repair it'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "compact" -d 'Give back the space that an image takes for nothing'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "chain" -d 'Show which images lie below which, and what is wrong between them'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "lint" -d 'Tell what of an image another place would refuse'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "map" -d 'List the extents of a disk'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "compare" -d 'Compare two disks'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "measure" -d 'Tell how large a converted image will be'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "resize" -d 'Change the size of a disk'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "snapshot" -d 'List, make, apply and delete internal snapshots'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "fork" -d 'Make a base of an image, with empty children over it'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "commit" -d 'Move what an image has into one below it'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "rebase" -d 'Give an image another backing image'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "bitmap" -d 'Add, remove, clear, merge, enable and disable dirty bitmaps'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "dirty" -d 'Make, show and change logs of which regions of a disk changed'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "amend" -d 'Change format options of an image in place'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "dd" -d 'Copy a part of a disk into a new image'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "bench" -d 'Measure how fast a disk is read or written'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "io" -d 'Read and write a disk\'s bytes by commands'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "serve" -d 'Serve disks until told to stop'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "ctl" -d 'Give commands to a running \'serve --control\''
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "completions" -d 'Print completions for a shell'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and not __fish_seen_subcommand_from create info convert check compact chain lint map compare measure resize snapshot fork commit rebase bitmap dirty amend dd bench io serve ctl completions help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and __fish_seen_subcommand_from dirty" -f -a "create" -d 'Make a log in which nothing is marked'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and __fish_seen_subcommand_from dirty" -f -a "info" -d 'Show what a log is of, and how much is marked'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and __fish_seen_subcommand_from dirty" -f -a "dump" -d 'List the ranges that are marked'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and __fish_seen_subcommand_from dirty" -f -a "set" -d 'Mark all regions that a part of the disk touches'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and __fish_seen_subcommand_from dirty" -f -a "clear" -d 'Clear all regions that lie wholly in a part of the disk'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and __fish_seen_subcommand_from dirty" -f -a "merge" -d 'Mark in a log what is marked in others, whatever their regions are'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "status" -d 'What is served, and how it does'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "stats" -d 'What was done so far: requests, bytes, failures, latencies'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "pause" -d 'Hold requests, and return once none is under way'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "resume" -d 'Go on after a pause or an error, with the I/O status reset'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "flush" -d 'Make completed writes durable'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "resize" -d 'Change the size of a disk'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "change" -d 'Go on with another image'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "reopen" -d 'Close the image and open it again, after something else has changed it'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "fork" -d 'Go on with an empty image that has the name of the image, which becomes its base'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "commit" -d 'Merge the images below the top one into BASE, while the disk is used; \'pause\' and \'resume\' hold that and let it go on, after an error too'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "limit" -d 'Set other limits'
complete -c vdtool -n "__fish_vdtool_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "stop" -d 'End serving: requests under way end, the images are flushed and closed'
