package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/recording/export"
	"github.com/sallyport/sallyport/recording/replay"
)

func recordingsExport(s *storeFlags) *cobra.Command {
	o := export.Options{Version: version, Results: formatData}
	var format, out string
	var names []string
	for _, f := range export.Formats {
		names = append(names, string(f))
	}
	c := &cobra.Command{
		Use: "export RECORDING", Short: "Write a recording as JSON Lines, Parquet, OCSF, asciicast or one HTML page", Args: exactArgs("RECORDING"),
		Long: `Verifies a recording and writes what of it can be believed, with what was found,
in a format that other tools read; see docs/recording.md for each. The exit code
is 1 when the recording is not as its node wrote it.

  jsonl         a line for the header, each entry and the ending
  parquet       a row for each entry
  ocsf          OCSF 1.8.0 Datastore Activity (6005), an event a line
  asciicast-v2  for asciinema and its players; a database session has no
  asciicast-v3  terminal and is shown as a client at a prompt has it
  html          one page that needs nothing else, for who has no account`,
		Example: `  sallyport recordings export ysv3ffz6ykcexusr --format html --out session.html`,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			o.Format = export.Format(format)
			store, trust, err := s.open(cmd.Context())
			if err != nil {
				return err
			}
			o.Trust = trust
			if o.Authorities, err = s.authorities(); err != nil {
				return err
			}
			item, err := replay.Find(cmd.Context(), store, args[0])
			if err != nil {
				return err
			}
			if out == "" && o.Format == export.Parquet && cmd.OutOrStdout() == os.Stdout && isTerminal(os.Stdout) {
				return usageError{errors.New("a Parquet file is not for a terminal: give --out FILE")}
			}
			var res *replay.Result
			err = writeOut(cmd.OutOrStdout(), out, func(w io.Writer) error {
				res, err = export.Write(cmd.Context(), w, store, item, o)
				return err
			})
			if err != nil {
				return err
			}
			if out != "" {
				say(cmd.ErrOrStderr(), "Wrote %s: the recording is %s.", out, res.State())
			}
			if res.State() == "broken" {
				return fmt.Errorf("the recording is not what its node wrote: %s", res.Why())
			}
			return nil
		},
	}
	fl := c.Flags()
	fl.StringVar(&format, "format", string(export.JSONL), strings.Join(names, ", "))
	fl.StringVar(&out, "out", "", "file to write, of mode 0600; it must not be there (default standard output)")
	fl.IntVar(&o.MaxBytes, "max-bytes", 16<<20, "size of an HTML page above which it is cut, and says so")
	return c
}

// writeOut writes to a new file, whole or not at all, or to std when there is
// no name.
func writeOut(std io.Writer, name string, f func(io.Writer) error) error {
	if name == "" {
		w := bufio.NewWriter(std)
		if err := f(w); err != nil {
			return err
		}
		return w.Flush()
	}
	if _, err := os.Lstat(name); err == nil {
		return fmt.Errorf("%s is there already", name)
	}
	tmp, err := os.CreateTemp(filepath.Dir(name), ".export-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	w := bufio.NewWriter(tmp)
	if err = f(w); err == nil {
		err = w.Flush()
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	return os.Link(tmp.Name(), name) // fails when somebody was faster
}
