package bundle

import (
	"os"
	"testing"
)

func TestExample(t *testing.T) {
	env := func(string) string { return "s3cret" }
	b, secrets, problems := Load(os.DirFS("../../deploy/example"), LoadOptions{Getenv: env})
	for _, p := range problems {
		t.Error(p)
	}
	if b == nil {
		t.FailNow()
	}
	if string(secrets["target/prod-db/admin-password"]) != "s3cret" || len(secrets) != 1 {
		t.Errorf("secrets are %v", secrets)
	}
	again, problems := Parse(b.Files, b.SecretNames(), ParseOptions{})
	if len(problems) > 0 || again.Digest != b.Digest {
		t.Errorf("read again: digest %s, was %s; problems %v", again.Digest, b.Digest, problems)
	}
	for _, c := range Plan(nil, b) {
	}
}
